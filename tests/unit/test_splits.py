"""Image splits: evaluation that serving repeats, and files that are not what they were."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tandem.checkpoints.card import Preprocessing
from tandem.data.manifest import ClassName, ImageDataset
from tandem.data.splits import PackedSplit, open_split
from tandem.errors import DatasetNotFound, TrainingFailed

PREPROCESSING = Preprocessing(resize=32, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def dataset(folder: Path, packed: bool, size: tuple[int, int] = (32, 32)) -> ImageDataset:
    rng = np.random.default_rng(0)
    rows, stack = [], []
    for number in range(8):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        path = folder / "train" / f"class{number // 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        rows.append({"file": str(path.relative_to(folder)), "label": number // 4})
        stack.append(pixels.transpose(2, 0, 1))
    (folder / "index").mkdir()
    (folder / "index" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if packed:
        (folder / "packed").mkdir()
        np.save(folder / "packed" / "train.npy", np.stack(stack))
    classes = (ClassName(id="class0", words="a"), ClassName(id="class1", words="b"))
    return ImageDataset(
        name="d", fingerprint="f", source="s", classes=classes, num_images={"train": 8}, image_size=size, packed=packed
    )


def test_packed_pixels_and_files_give_the_same_evaluation(tmp_path: Path) -> None:
    manifest = dataset(tmp_path, packed=True)
    packed = open_split(tmp_path, manifest, "train", PREPROCESSING, None)
    files = open_split(tmp_path, manifest.model_copy(update={"packed": False}), "train", PREPROCESSING, None)
    rows = torch.tensor([5, 0, 3])
    assert torch.equal(packed.eval_batch(rows), files.eval_batch(rows))


def test_a_limit_takes_the_same_share_of_each_class(tmp_path: Path) -> None:
    split = open_split(tmp_path, dataset(tmp_path, packed=True), "train", PREPROCESSING, 4)
    assert split.labels.tolist() == [0, 0, 1, 1]
    assert split.eval_batch(torch.tensor([1])).shape == (1, 3, 32, 32)


def test_images_of_any_shape_become_square(tmp_path: Path) -> None:
    split = open_split(tmp_path, dataset(tmp_path, packed=False, size=(40, 100)), "train", PREPROCESSING, None)
    assert split.eval_batch(torch.arange(3)).shape == (3, 3, 32, 32)


def test_a_missing_split_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    manifest = dataset(tmp_path, packed=False)
    with pytest.raises(DatasetNotFound, match="no split 'val'"):
        open_split(tmp_path, manifest, "val", PREPROCESSING, None)
    (tmp_path / "train" / "class0" / "2.png").write_bytes(b"\x89PNG broken")
    split = open_split(tmp_path, manifest, "train", PREPROCESSING, None)
    with pytest.raises(TrainingFailed, match=r"class0/2\.png can't be used"):
        split.eval_batch(torch.tensor([2]))


def test_packed_pixels_held_on_a_device_are_the_same(tmp_path: Path) -> None:
    mapped = open_split(tmp_path, dataset(tmp_path, packed=True), "train", PREPROCESSING, 4)
    assert isinstance(mapped, PackedSplit)
    held = mapped.on(torch.device("cpu"))
    rows = torch.tensor([3, 1])
    assert torch.equal(held.pixels(rows), mapped.pixels(rows))
    assert torch.equal(held.labels, mapped.labels)
    assert held.num_bytes == mapped.num_bytes == 4 * 3 * 32 * 32


def with_sizes(folder: Path) -> None:
    index = folder / "index" / "train.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    lines = (json.dumps({**row, "bytes": (folder / row["file"]).stat().st_size}) for row in rows)
    index.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(("damage", "message"), [("cut", "has 40 bytes, not"), ("remove", "is not there")])
def test_a_file_that_changed_since_it_was_prepared_is_found_at_the_start(
    tmp_path: Path, damage: str, message: str
) -> None:
    manifest = dataset(tmp_path, packed=False)
    with_sizes(tmp_path)
    open_split(tmp_path, manifest, "train", PREPROCESSING, None)
    file = tmp_path / "train" / "class1" / "6.png"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:40])
    else:
        file.unlink()
    with pytest.raises(TrainingFailed, match=rf"class1/6\.png {message}.*prepare the dataset again"):
        open_split(tmp_path, manifest, "train", PREPROCESSING, None)


def test_a_packed_file_that_was_cut_or_is_anothers_is_found_at_the_start(tmp_path: Path) -> None:
    manifest = dataset(tmp_path, packed=True)
    path = tmp_path / "packed" / "train.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(TrainingFailed, match=r"train\.npy can't be read"):
        open_split(tmp_path, manifest, "train", PREPROCESSING, None)
    np.save(path, np.zeros((3, 3, 32, 32), dtype=np.uint8))
    with pytest.raises(TrainingFailed, match="holds 3 images, its index 8"):
        open_split(tmp_path, manifest, "train", PREPROCESSING, None)
