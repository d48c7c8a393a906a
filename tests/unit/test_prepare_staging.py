import errno
import fcntl
import json
from pathlib import Path

import pytest
from prepare_samples import Recorder, encode, picture, visible, write_tree

from tandem.data.manifest import list_datasets, read_dataset
from tandem.data.prepare import prepare_image_folder, prepare_text
from tandem.data.prepare.image_writer import ImageWriter
from tandem.data.prepare.sources import TreeSource
from tandem.errors import BadSource, Conflict, InvalidName, VolumeUnavailable
from tandem.volume import Volume


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "home")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(
        tmp_path / "in", {f"{name}/{i}.png": encode(picture(i), "PNG") for name in "ab" for i in range(3)}
    )


def test_what_is_prepared_already_is_left_alone(volume: Volume, source: Path) -> None:
    first = prepare_image_folder(volume, source, "mine")
    inode = volume.dataset("mine").stat().st_ino
    progress = Recorder()
    assert prepare_image_folder(volume, source, "mine", progress=progress) == first
    assert volume.dataset("mine").stat().st_ino == inode
    assert "preparing images" not in progress.stages
    assert visible(volume.datasets) == ["mine"]


def change_a_file(source: Path) -> None:
    (source / "a/0.png").write_bytes(encode(picture(9), "PNG"))


def add_a_file(source: Path) -> None:
    (source / "a/9.png").write_bytes(encode(picture(9), "PNG"))


@pytest.mark.parametrize("change", [change_a_file, add_a_file])
def test_another_source_conflicts_unless_forced(volume: Volume, source: Path, change: object) -> None:
    before = prepare_image_folder(volume, source, "mine")
    assert callable(change)
    change(source)
    with pytest.raises(Conflict, match=r"'mine' is there already, prepared from .*--force"):
        prepare_image_folder(volume, source, "mine")
    assert read_dataset(volume, "mine") == before

    after = prepare_image_folder(volume, source, "mine", force=True)
    assert after.fingerprint != before.fingerprint
    assert read_dataset(volume, "mine") == after
    assert visible(volume.datasets) == ["mine"]


def test_other_options_conflict(volume: Volume, source: Path) -> None:
    prepare_image_folder(volume, source, "mine")
    with pytest.raises(Conflict):
        prepare_image_folder(volume, source, "mine", seed=1)


def test_a_forced_replacement_that_fails_leaves_the_old_dataset(volume: Volume, source: Path) -> None:
    before = prepare_image_folder(volume, source, "mine")
    (source / "b/2.png").write_bytes(b"no image")
    with pytest.raises(BadSource):
        prepare_image_folder(volume, source, "mine", force=True)
    assert read_dataset(volume, "mine") == before
    assert visible(volume.datasets) == ["mine"]


def test_a_folder_that_was_not_prepared_is_not_overwritten(volume: Volume, source: Path) -> None:
    write_tree(volume.dataset("mine"), {"precious": b"1"})
    with pytest.raises(Conflict):
        prepare_image_folder(volume, source, "mine")
    assert (volume.dataset("mine") / "precious").exists()


def test_a_replacement_killed_between_its_renames_is_put_right(volume: Volume, source: Path) -> None:
    before = prepare_image_folder(volume, source, "mine")
    volume.dataset("mine").rename(volume.datasets / ".mine.old")
    assert prepare_image_folder(volume, source, "mine") == before
    assert visible(volume.datasets) == ["mine"]


def test_two_at_once(volume: Volume, source: Path) -> None:
    volume.datasets.mkdir(parents=True)
    with open(volume.datasets / ".mine.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="'mine' is being prepared by another process"):
            prepare_image_folder(volume, source, "mine")
        prepare_image_folder(volume, source, "other")
    prepare_image_folder(volume, source, "mine")
    assert visible(volume.datasets) == ["mine", "other"]


def test_an_unfinished_dataset_is_not_listed(volume: Volume, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_image_folder(volume, source, "mine", progress=Recorder(interrupt_at=1))
    assert visible(volume.datasets) == [".mine.partial"]
    assert list_datasets(volume) == []


def test_a_damaged_note_starts_over(volume: Volume, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_image_folder(volume, source, "mine", progress=Recorder(interrupt_at=1))
    for note in (volume.datasets / ".mine.partial/.work").iterdir():
        note.write_bytes(note.read_bytes()[:20])
    assert sum(prepare_image_folder(volume, source, "mine").num_images.values()) == 6


def test_names_are_checked_before_they_become_paths(volume: Volume, source: Path) -> None:
    with pytest.raises(InvalidName):
        prepare_image_folder(volume, source, "../mine")


def test_a_full_volume_leaves_nothing(volume: Volume, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ImageWriter, path: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(ImageWriter, "_write_file", full)
    with pytest.raises(VolumeUnavailable, match=r"No space left on device.*TANDEM_HOME"):
        prepare_image_folder(volume, source, "mine")
    assert visible(volume.datasets) == []


def test_a_volume_that_is_no_folder(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VolumeUnavailable):
        prepare_image_folder(Volume(tmp_path / "file"), source, "mine")


def test_the_source_that_can_t_be_read_is_not_taken_for_the_volume(
    volume: Volume, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TreeSource, name: str, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(TreeSource, "_check_size", broken)
    with pytest.raises(BadSource, match=r"can't read a/.\.png in .*: Input/output error"):
        prepare_image_folder(volume, source, "mine")


def test_the_record_says_what_a_dataset_was_made_from(volume: Volume, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a b\nc d\ne f\n")
    prepare_text(volume, text, "words")
    record = json.loads((volume.dataset("words") / "source.json").read_bytes())
    assert record["origin"] == str(text)
    assert record["options"] == {"tokenizer": "words", "max_vocabulary": None}
