"""Image splits: augmentation that depends on its generator alone, and evaluation that serving repeats."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tandem.checkpoints.card import Preprocessing
from tandem.data.manifest import ClassName, ImageDataset
from tandem.data.splits import crop_box, mirrored, open_split, shifted
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


@pytest.mark.parametrize("packed", [True, False])
def test_augmentation_is_a_function_of_its_generator(tmp_path: Path, packed: bool) -> None:
    split = open_split(tmp_path, dataset(tmp_path, packed), "train", PREPROCESSING, None)
    rows = torch.arange(8)

    def draw(seed: int) -> torch.Tensor:
        return split.train_batch(rows, torch.Generator().manual_seed(seed), crop=True, flip=True)

    assert draw(1).shape == (8, 3, 32, 32)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_without_augmentation_training_sees_what_evaluation_sees(tmp_path: Path) -> None:
    split = open_split(tmp_path, dataset(tmp_path, packed=True), "train", PREPROCESSING, None)
    rows = torch.arange(8)
    plain = split.train_batch(rows, torch.Generator(), crop=False, flip=False)
    assert torch.equal(plain, split.eval_batch(rows))


def test_a_limit_takes_the_same_share_of_each_class(tmp_path: Path) -> None:
    split = open_split(tmp_path, dataset(tmp_path, packed=True), "train", PREPROCESSING, 4)
    assert split.labels.tolist() == [0, 0, 1, 1]
    assert split.eval_batch(torch.tensor([1])).shape == (1, 3, 32, 32)


def test_images_of_any_shape_become_square(tmp_path: Path) -> None:
    split = open_split(tmp_path, dataset(tmp_path, packed=False, size=(40, 100)), "train", PREPROCESSING, None)
    assert split.eval_batch(torch.arange(3)).shape == (3, 3, 32, 32)


def test_shifts_move_whole_images_and_mirrors_keep_their_pixels() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    seen = {shifted(image, torch.Generator().manual_seed(seed)).sum().item() for seed in range(40)}
    assert len(seen) > 5
    for seed in range(6):
        result = mirrored(image, torch.Generator().manual_seed(seed))
        assert torch.equal(result, image) or torch.equal(result, image.flip(-1))


def test_crops_lie_within_the_image() -> None:
    for seed in range(200):
        top, left, height, width = crop_box(37, 90, torch.Generator().manual_seed(seed))
        assert 0 <= top <= 37 - height
        assert 0 <= left <= 90 - width
        assert height > 0
        assert width > 0


def test_a_missing_split_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    manifest = dataset(tmp_path, packed=False)
    with pytest.raises(DatasetNotFound, match="no split 'val'"):
        open_split(tmp_path, manifest, "val", PREPROCESSING, None)
    (tmp_path / "train" / "class0" / "2.png").write_bytes(b"\x89PNG broken")
    split = open_split(tmp_path, manifest, "train", PREPROCESSING, None)
    with pytest.raises(TrainingFailed, match=r"class0/2\.png can't be used"):
        split.eval_batch(torch.tensor([2]))
