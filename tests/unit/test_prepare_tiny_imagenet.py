import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepare_samples import WNIDS, Recorder, tiny_imagenet_files, tree_digest, visible, write_tree, write_zip

from tandem.data.manifest import ImageDataset, read_dataset, read_index
from tandem.data.prepare import prepare_tiny_imagenet
from tandem.data.prepare.tiny_imagenet import ZIP_MD5
from tandem.errors import BadSource
from tandem.volume import Volume


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "home")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tiny-imagenet-200", tiny_imagenet_files())


def refused(volume: Volume, source: Path) -> str:
    """Prepare what must not be prepared; return the one line, having seen that nothing is left."""
    with pytest.raises(BadSource) as caught:
        prepare_tiny_imagenet(volume, source, checksum=False)
    assert visible(volume.datasets) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_val_is_regrouped_and_labels_are_the_sorted_wnids(volume: Volume, tree: Path) -> None:
    dataset = prepare_tiny_imagenet(volume, tree)

    assert [entry.id for entry in dataset.classes] == list(WNIDS)
    assert dataset.classes[0].words == f"thing {WNIDS[0]}, other word"
    assert dataset.num_images == {"train": 12, "val": 6}
    directory = volume.dataset("tiny-imagenet")
    index = read_index(directory, "val")
    assert index[:2] == [(f"val/{WNIDS[0]}/val_0.JPEG", 0), (f"val/{WNIDS[0]}/val_3.JPEG", 0)]
    assert read_index(directory, "train")[4] == (f"train/{WNIDS[1]}/{WNIDS[1]}_0.JPEG", 1)
    assert read_dataset(volume, "tiny-imagenet") == dataset
    assert not (directory / "test").exists()


def test_one_channel_images_become_three_channel_jpegs_near_the_source_and_others_stay(
    volume: Volume, tree: Path
) -> None:
    dataset = prepare_tiny_imagenet(volume, tree)

    assert dataset.num_converted == 6
    for file, _ in read_index(volume.dataset("tiny-imagenet"), "train"):
        _, wnid, name = file.split("/")
        before, after = tree / "train" / wnid / "images" / name, volume.dataset("tiny-imagenet") / file
        with Image.open(before) as old, Image.open(after) as new:
            assert (new.mode, new.format) == ("RGB", "JPEG")
            if old.mode == "RGB":
                assert before.read_bytes() == after.read_bytes()
            else:
                difference = np.asarray(new).astype(int) - np.asarray(old.convert("RGB"))
                assert np.abs(difference).max() <= 4


def test_packed_pixels_equal_the_decoded_files(volume: Volume, tree: Path) -> None:
    dataset = prepare_tiny_imagenet(volume, tree)

    assert dataset.packed
    assert dataset.image_size == (8, 8)
    directory = volume.dataset("tiny-imagenet")
    for split in ("train", "val"):
        index = read_index(directory, split)
        packed = np.load(directory / "packed" / f"{split}.npy")
        assert packed.shape == (len(index), 3, 8, 8)
        for row, (file, _) in zip(packed, index, strict=True):
            with Image.open(directory / file) as image:
                assert np.array_equal(row.transpose(1, 2, 0), np.asarray(image))


def test_tree_parent_and_zip_give_the_same_dataset_and_the_source_stays(volume: Volume, tree: Path) -> None:
    zipped = write_zip(tree.parent / "a.zip", tiny_imagenet_files(), "tiny-imagenet-200/")
    before = tree_digest(tree), zipped.read_bytes()

    sources = {"tree": tree, "parent": tree.parent, "zip": zipped}
    made = {name: prepare_tiny_imagenet(volume, source, name, checksum=False) for name, source in sources.items()}

    assert len({dataset.fingerprint for dataset in made.values()}) == 1
    assert (tree_digest(tree), zipped.read_bytes()) == before


def test_a_zip_is_held_to_the_official_checksum(volume: Volume, tmp_path: Path) -> None:
    zipped = write_zip(tmp_path / "a.zip", tiny_imagenet_files())
    with pytest.raises(BadSource, match=rf"altered or truncated.*MD5.*{ZIP_MD5}.*--no-checksum"):
        prepare_tiny_imagenet(volume, zipped)
    assert visible(volume.datasets) == []


def test_a_truncated_zip(volume: Volume, tmp_path: Path) -> None:
    zipped = write_zip(tmp_path / "a.zip", tiny_imagenet_files())
    zipped.write_bytes(zipped.read_bytes()[:-200])
    assert "truncated" in refused(volume, zipped)


def test_a_zip_with_a_flipped_byte_names_the_image(volume: Volume, tmp_path: Path) -> None:
    zipped = write_zip(tmp_path / "a.zip", tiny_imagenet_files())
    name = f"train/{WNIDS[1]}/images/{WNIDS[1]}_2.JPEG"
    with zipfile.ZipFile(zipped) as archive:
        at = archive.getinfo(name).header_offset + 30 + len(name) + 40
    data = bytearray(zipped.read_bytes())
    data[at] ^= 0xFF
    zipped.write_bytes(data)
    assert name in refused(volume, zipped)


@pytest.mark.parametrize("name", ["../evil.JPEG", "/etc/evil", "train/../../evil", "a\\..\\evil", "C:/evil"])
def test_an_entry_that_climbs_out_is_named_and_nothing_is_written(volume: Volume, tmp_path: Path, name: str) -> None:
    zipped = write_zip(tmp_path / "a.zip", {**tiny_imagenet_files(), name: b"x"})
    message = refused(volume, zipped)
    assert repr(name) in message
    assert "climbs out" in message
    assert not list(tmp_path.rglob("*evil*"))


def test_a_link_in_a_zip_is_refused(volume: Volume, tmp_path: Path) -> None:
    zipped = write_zip(tmp_path / "a.zip", tiny_imagenet_files())
    link = zipfile.ZipInfo("train/link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "'train/link', which is a link" in refused(volume, zipped)


def test_an_image_over_the_size_limit_is_refused_before_it_is_read(
    volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.data.prepare.sources.MAX_FILE_BYTES", 2000)
    bomb = f"train/{WNIDS[0]}/images/bomb.JPEG"
    zipped = write_zip(tmp_path / "a.zip", {**tiny_imagenet_files(), bomb: bytes(3000)})
    assert bomb in refused(volume, zipped)


@pytest.mark.parametrize("missing", ["val/val_annotations.txt", "wnids.txt", "words.txt"])
def test_a_missing_list_is_named(volume: Volume, tree: Path, missing: str) -> None:
    (tree / missing).unlink()
    assert f"{missing} is missing" in refused(volume, tree)


def test_a_val_image_without_annotation(volume: Volume, tree: Path) -> None:
    write_tree(tree, {"val/images/val_99.JPEG": b"x"})
    assert "val_99.JPEG has no annotation" in refused(volume, tree)


def test_an_annotation_of_an_unknown_class(volume: Volume, tree: Path) -> None:
    annotations = tree / "val/val_annotations.txt"
    annotations.write_text(annotations.read_text().replace(f"val_4.JPEG\t{WNIDS[1]}", "val_4.JPEG\tn00000000"))
    assert "val_4.JPEG is annotated with 'n00000000'" in refused(volume, tree)


def test_a_line_of_annotations_that_is_none(volume: Volume, tree: Path) -> None:
    (tree / "val/val_annotations.txt").write_text("what is this\n")
    assert "line 1 of val/val_annotations.txt" in refused(volume, tree)


def test_a_class_folder_without_images(volume: Volume, tree: Path) -> None:
    for image in (tree / "train" / WNIDS[2] / "images").iterdir():
        image.unlink()
    assert f"train/{WNIDS[2]} has no images" in refused(volume, tree)


def test_a_class_folder_that_is_not_listed(volume: Volume, tree: Path) -> None:
    (tree / "train" / WNIDS[2]).rename(tree / "train" / "n00000001")
    assert "n00000001 is not in wnids.txt" in refused(volume, tree)


def test_fewer_than_two_classes(volume: Volume, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "one", tiny_imagenet_files(WNIDS[:1]))
    assert "at least 2" in refused(volume, tree)


def test_missing_classes_and_val_images_need_a_word(volume: Volume, tmp_path: Path) -> None:
    files = tiny_imagenet_files()
    del files["val/images/val_3.JPEG"]
    part = {name: data for name, data in files.items() if not name.startswith(f"train/{WNIDS[1]}")}
    tree = write_tree(tmp_path / "part", part)

    message = refused(volume, tree)
    assert f"1 of the 3 classes in wnids.txt have no train images ({WNIDS[1]})" in message
    assert "--allow-missing" in message

    dataset = prepare_tiny_imagenet(volume, tree, allow_missing=True)
    assert [entry.id for entry in dataset.classes] == [WNIDS[0], WNIDS[2]]
    assert dataset.num_images == {"train": 8, "val": 3}


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_an_image_that_does_not_decode_is_named(volume: Volume, tree: Path, damage: str) -> None:
    victim = tree / "val/images/val_4.JPEG"
    victim.write_bytes(victim.read_bytes()[:-80] if damage == "truncated" else b"not an image")
    assert "val/images/val_4.JPEG does not decode" in refused(volume, tree)


def test_no_tiny_imagenet_at_all(volume: Volume, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no Tiny-ImageNet" in refused(volume, tmp_path / "empty")
    assert "there is no file or folder" in refused(volume, tmp_path / "nowhere")
    page = tmp_path / "page.zip"
    page.write_text("<html>")
    assert "neither a folder nor a zip file" in refused(volume, page)


def many(tmp_path: Path) -> Path:
    """A source of more chunks than one process would take."""
    return write_tree(tmp_path / "many", tiny_imagenet_files(num_train=300, num_val=5))


def test_several_processes_give_what_one_gives(volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = many(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    several = prepare_tiny_imagenet(volume, source, "several")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    one = prepare_tiny_imagenet(volume, source, "one")
    assert several.fingerprint == one.fingerprint
    for file in ("packed/train.npy", "packed/val.npy", "index/train.jsonl"):
        assert (volume.dataset("several") / file).read_bytes() == (volume.dataset("one") / file).read_bytes()


def test_an_image_that_does_not_decode_in_another_process(
    volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    source = many(tmp_path)
    (source / f"train/{WNIDS[2]}/images/{WNIDS[2]}_299.JPEG").write_bytes(b"")
    assert f"{WNIDS[2]}_299.JPEG does not decode" in refused(volume, source)


@pytest.mark.parametrize("num_cores", [1, 2])
def test_an_interrupted_preparation_goes_on(
    volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(num_cores)))
    source = many(tmp_path)
    whole = prepare_tiny_imagenet(volume, source, "whole")
    with pytest.raises(KeyboardInterrupt):
        prepare_tiny_imagenet(volume, source, "a", progress=Recorder(interrupt_at=256))
    staging = volume.datasets / ".a.partial"
    assert visible(volume.datasets) == [".a.partial", "whole"]
    notes = {path.name for path in (staging / ".work").glob("*-*.json")}
    first = staging / f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG"
    assert notes
    written = {path: path.stat().st_mtime_ns for path in staging.glob("train/*/*")}
    resumed = prepare_tiny_imagenet(volume, source, "a")

    assert resumed.fingerprint == whole.fingerprint
    assert visible(volume.datasets) == ["a", "whole"]
    kept = [
        path
        for path, at in written.items()
        if (volume.dataset("a") / path.relative_to(staging)).stat().st_mtime_ns == at
    ]
    assert len(kept) >= 256
    assert "train-00000000.json" not in notes or first in kept
    packed = [(volume.dataset(name) / "packed/train.npy").read_bytes() for name in ("a", "whole")]
    assert packed[0] == packed[1]


def test_what_a_power_cut_left_half_written_is_done_again(
    volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    source = many(tmp_path)
    whole = prepare_tiny_imagenet(volume, source, "whole")
    with pytest.raises(KeyboardInterrupt):
        prepare_tiny_imagenet(volume, source, "a", progress=Recorder(interrupt_at=512))
    staging = volume.datasets / ".a.partial"
    (staging / f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG").write_bytes(b"")
    with open(staging / "packed/train.npy", "r+b") as file:
        file.seek(128 + 300 * 3 * 64)  # row 300, in the second chunk
        file.write(bytes(3 * 64))

    assert prepare_tiny_imagenet(volume, source, "a").fingerprint == whole.fingerprint
    packed = [(volume.dataset(name) / "packed/train.npy").read_bytes() for name in ("a", "whole")]
    assert packed[0] == packed[1]


def test_another_source_starts_the_staging_directory_anew(volume: Volume, tmp_path: Path) -> None:
    source = many(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare_tiny_imagenet(volume, source, "a", progress=Recorder(interrupt_at=1))
    other = write_tree(tmp_path / "other", tiny_imagenet_files())
    dataset = prepare_tiny_imagenet(volume, other, "a")
    assert isinstance(dataset, ImageDataset)
    files = {str(path.relative_to(volume.dataset("a"))) for path in volume.dataset("a").glob("*/n*/*")}
    assert files == {file for split in ("train", "val") for file, _ in read_index(volume.dataset("a"), split)}
