import json
import re
from pathlib import Path

import numpy as np
import pytest
from prepare_samples import deep_grey, encode, picture, tree_digest, visible, write_tree, write_zip

from tandem.data.images import decode_image
from tandem.data.manifest import read_index, read_sizes
from tandem.data.prepare import prepare_image_folder
from tandem.errors import BadSource, DatasetNotFound, InvalidRequest
from tandem.volume import Volume


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "home")


def class_folders(counts: dict[str, int], under: str = "") -> dict[str, bytes]:
    return {
        f"{under}{name}/{i}.jpg": encode(picture(i + len(name))) for name, count in counts.items() for i in range(count)
    }


def refused(volume: Volume, source: Path) -> str:
    with pytest.raises(BadSource) as caught:
        prepare_image_folder(volume, source, "mine")
    assert visible(volume.datasets) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_of(volume: Volume, split: str, name: str = "mine") -> list[str]:
    return [file for file, _ in read_index(volume.dataset(name), split)]


def test_val_is_drawn_for_each_class_by_the_seed(volume: Volume, tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", class_folders({"cat": 20, "dog": 2, "élan ü": 1}))
    before = tree_digest(source)

    dataset = prepare_image_folder(volume, source, "mine")
    other = prepare_image_folder(volume, source, "other", seed=1)
    again = prepare_image_folder(volume, source, "again")

    assert [entry.id for entry in dataset.classes] == ["cat", "dog", "élan ü"]
    assert dataset.num_images == {"train": 20, "val": 3}
    val = files_of(volume, "val")
    assert [file.split("/")[1] for file in val] == ["cat", "cat", "dog"]
    assert not set(val) & set(files_of(volume, "train"))
    assert dataset.fingerprint == again.fingerprint != other.fingerprint
    assert tree_digest(source) == before


@pytest.mark.parametrize(("fraction", "num_val"), [(0.001, 1), (0.5, 5), (0.999, 9)])
def test_a_class_keeps_an_image_on_either_side(volume: Volume, tmp_path: Path, fraction: float, num_val: int) -> None:
    source = write_tree(tmp_path / "in", class_folders({"a": 10, "b": 10}))
    assert prepare_image_folder(volume, source, "mine", val_fraction=fraction).num_images["val"] == 2 * num_val


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_fraction_that_is_none(volume: Volume, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(InvalidRequest):
        prepare_image_folder(volume, tmp_path, "mine", val_fraction=fraction)


@pytest.mark.parametrize("val", ["val", "valid", "test"])
def test_splits_of_the_person(volume: Volume, tmp_path: Path, val: str) -> None:
    files = class_folders({"a": 3, "b": 2}, "train/") | class_folders({"a": 1}, f"{val}/")
    dataset = prepare_image_folder(volume, write_tree(tmp_path / "in", files), "mine")
    assert dataset.num_images == {"train": 5, "val": 1}
    assert files_of(volume, "val") == ["val/a/0.jpg"]


def test_a_zipped_folder_and_what_is_no_image_in_it(volume: Volume, tmp_path: Path) -> None:
    files = class_folders({"a": 3, "b": 2}) | {
        "a/deep/0.JPG": encode(picture(9)),
        "a/notes.txt": b"-",
        "a/.hidden.jpg": b"-",
        ".DS_Store": b"-",
        "__MACOSX/a/0.jpg": b"-",
    }
    zipped = write_zip(tmp_path / "a.zip", {f"pets/{name}": data for name, data in files.items()})
    dataset = prepare_image_folder(volume, zipped, "mine")
    assert dataset.num_images == {"train": 4, "val": 2}
    both = files_of(volume, "train") + files_of(volume, "val")
    assert any(file.endswith("/a/deep__0.JPG") for file in both)


def test_large_images_keep_their_files_and_are_not_packed(volume: Volume, tmp_path: Path) -> None:
    large = {f"{name}/{i}.jpg": encode(picture(i, size=(120, 100))) for name in "ab" for i in range(2)}
    dataset = prepare_image_folder(volume, write_tree(tmp_path / "in", large), "mine")
    assert (dataset.image_size, dataset.packed) == ((100, 120), False)
    assert not (volume.dataset("mine") / "packed").exists()


def test_small_images_of_various_sizes_are_not_packed(volume: Volume, tmp_path: Path) -> None:
    files = class_folders({"a": 3, "b": 3}) | {"a/9.jpg": encode(picture(size=(9, 8)))}
    dataset = prepare_image_folder(volume, write_tree(tmp_path / "in", files), "mine")
    assert (dataset.image_size, dataset.packed) == (None, False)
    assert not (volume.dataset("mine") / "packed").exists()


def test_a_gif_is_written_as_png_under_a_name_of_its_own(volume: Volume, tmp_path: Path) -> None:
    files = class_folders({"a": 2, "b": 2}) | {"a/x.gif": encode(picture(mode="P"), "GIF"), "a/x.png": b""}
    files["a/x.png"] = encode(picture(3), "PNG")
    dataset = prepare_image_folder(volume, write_tree(tmp_path / "in", files), "mine")
    assert dataset.num_converted == 1
    names = {Path(file).name for file in files_of(volume, "train") + files_of(volume, "val")}
    assert {"x.gif.png", "x.png"} <= names


def test_names_that_would_collide(volume: Volume, tmp_path: Path) -> None:
    files = class_folders({"b": 2}, "train/") | class_folders({"a": 1, "b": 1}, "val/")
    files |= {"train/a/x.gif": encode(picture(mode="P"), "GIF"), "train/a/x.gif.png": encode(picture(), "PNG")}
    assert "x.gif.png" in refused(volume, write_tree(tmp_path / "in", files))


def test_sources_that_are_no_class_folders(volume: Volume, tmp_path: Path) -> None:
    assert "has no images" in refused(volume, write_tree(tmp_path / "1", {**class_folders({"a": 2}), "b/x.txt": b""}))
    assert "at least 2" in refused(volume, write_tree(tmp_path / "2", class_folders({"a": 5})))
    assert "at least 2" in refused(volume, write_tree(tmp_path / "3", {"x.jpg": encode(picture())}))
    stray = class_folders({"a": 2, "b": 2}, "train/") | class_folders({"c": 1}, "val/")
    assert "class 'c' is in val/ and not in train/" in refused(volume, write_tree(tmp_path / "4", stray))
    assert "no images for the val split" in refused(volume, write_tree(tmp_path / "5", class_folders({"a": 1, "b": 1})))


def test_one_image_in_the_whole_set(volume: Volume, tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", class_folders({"only": 1}))
    assert "holds 1 class folder with images; a classifier needs at least 2" in refused(volume, source)


def test_an_empty_class_folder_is_named_with_the_remedy(volume: Volume, tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", class_folders({"a": 2, "b": 2}))
    (source / "c").mkdir()
    assert re.search(r"class folder c in .* has no images \(.*\); add some, or remove it", refused(volume, source))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "it is no image of a known format"),
        (encode(picture(size=(64, 64)))[:-300], "it is damaged or truncated"),
        (encode(picture(size=(64, 64)))[:100], "it is damaged or truncated"),
    ],
    ids=["empty", "page", "truncated", "header only"],
)
def test_a_bad_image_is_named_and_nothing_is_left(volume: Volume, tmp_path: Path, data: bytes, says: str) -> None:
    source = write_tree(tmp_path / "in", class_folders({"a": 3, "b": 3}) | {"b/9.jpg": data})
    message = refused(volume, source)
    assert message.startswith("b/9.jpg does not decode")
    assert says in message
    assert message.endswith("; replace it, or remove it from the source")


def test_every_rare_kind_of_image_is_prepared_to_what_training_decodes(volume: Volume, tmp_path: Path) -> None:
    """Packed pixels equal the decoded files, whatever the source was."""
    frames = [picture(seed) for seed in (0, 5)]
    kinds = {
        "cmyk.jpg": encode(picture(mode="CMYK")),
        "grey.jpg": encode(picture(mode="L")),
        "plain.jpg": encode(picture()),
        "alpha.png": encode(picture(mode="RGBA"), "PNG"),
        "palette.png": encode(picture(mode="P"), "PNG", transparency=3),
        "deep.png": encode(deep_grey(), "PNG"),
        "moving.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    files = {f"{split}/{name}/{file}": kinds[file] for split in ("train", "val") for name in "ab" for file in kinds}
    dataset = prepare_image_folder(volume, write_tree(tmp_path / "in", files), "mine")

    assert (dataset.packed, dataset.num_converted) == (True, 2 * 2 * (len(kinds) - 1))
    directory = volume.dataset("mine")
    for split in ("train", "val"):
        packed = np.load(directory / "packed" / f"{split}.npy")
        for row, (file, _) in zip(packed, read_index(directory, split), strict=True):
            assert np.array_equal(row, decode_image((directory / file).read_bytes()).numpy()), file


def test_the_index_holds_the_size_of_each_file(volume: Volume, tmp_path: Path) -> None:
    prepare_image_folder(volume, write_tree(tmp_path / "in", class_folders({"a": 3, "b": 3})), "mine")
    directory = volume.dataset("mine")
    for split in ("train", "val"):
        sizes = [(directory / file).stat().st_size for file in files_of(volume, split)]
        assert read_sizes(directory, split) == sizes


def test_a_dataset_of_before_has_no_sizes(volume: Volume, tmp_path: Path) -> None:
    prepare_image_folder(volume, write_tree(tmp_path / "in", class_folders({"a": 3, "b": 3})), "mine")
    index = volume.dataset("mine") / "index/val.jsonl"
    before = [{"file": file, "label": label} for file, label in read_index(volume.dataset("mine"), "val")]
    index.write_text("".join(f"{json.dumps(row)}\n" for row in before))
    assert read_sizes(volume.dataset("mine"), "val") is None
    with pytest.raises(DatasetNotFound, match="no split 'test'"):
        read_sizes(volume.dataset("mine"), "test")


def test_a_name_with_a_line_break(volume: Volume, tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", class_folders({"a\nb": 2, "c": 2}))
    assert r"'a\nb'" in refused(volume, source)


def test_a_line_separator_in_an_image_name_does_not_break_the_index(volume: Volume, tmp_path: Path) -> None:
    files = class_folders({"a": 3, "b": 3}) | {"a/Screen\u202fshot 📷.jpg": encode(picture())}
    dataset = prepare_image_folder(volume, write_tree(tmp_path / "in", files), "mine")
    assert len(files_of(volume, "train")) + len(files_of(volume, "val")) == sum(dataset.num_images.values())


def test_a_link_that_leads_round_in_a_circle(volume: Volume, tmp_path: Path) -> None:
    source = write_tree(tmp_path / "in", class_folders({"a": 2, "b": 2}))
    (source / "a" / "up").symlink_to(source)
    assert sum(prepare_image_folder(volume, source, "mine").num_images.values()) == 4
