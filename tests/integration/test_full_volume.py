"""A volume that is full: a real small one, in memory, that fills up while a run trains on it."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import write_text_dataset
from training_process import end_state, events, finish, new_run, start

from tandem.checkpoints.files import list_checkpoints, read_pointer, verify
from tandem.volume import Volume

VALUES: dict[str, Any] = {
    "kind": "train_language_model",
    "dataset": "text",
    "model_name": "m",
    "model": "LSTM",
    "embedding_size": 64,
    "hidden_size": 64,
    "batch_size": 4,
    "bptt": 10,
    "num_threads": 1,
    "epochs": 2,
    "checkpoint_every_s": 0.05,
}
BYTES = 12 * 2**20


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    """Return a volume of 12 MiB and 400 files with a text on it."""
    home = tmp_path / "home"
    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={BYTES},nr_inodes=400", "tmpfs", str(home)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no small volume can be mounted here: {mounted.stderr.strip()}")
    try:
        volume = Volume(home)
        write_text_dataset(volume, "text")
        yield volume
    finally:
        subprocess.run(["umount", str(home)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what the run ends in where there is room."""
    volume = Volume(tmp_path_factory.mktemp("roomy"))
    write_text_dataset(volume, "text")
    run = new_run(volume, "straight", VALUES)
    finish(run)
    return end_state(run)


class Ballast:
    """Files of somebody else, that fill the volume."""

    def __init__(self, volume: Volume) -> None:
        self._folder = volume.home / "ballast"
        self._folder.mkdir()

    def take_bytes(self, but: int = 0) -> None:
        """Fill the volume, but for so many bytes."""
        free = os.statvfs(self._folder)
        count = free.f_bavail * free.f_frsize - but
        with contextlib.suppress(OSError), open(self._folder / "bytes", "wb", buffering=0) as file:
            file.write(bytes(max(count, 0)))

    def take_files(self, but: int) -> None:
        """Leave room for so many new files, though there are bytes for many."""
        for number in range(os.statvfs(self._folder).f_favail - but):
            (self._folder / f"file-{number}").touch()

    def make_room(self) -> None:
        for path in self._folder.iterdir():
            path.unlink()


def left_behind(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_volume_that_fills_up_in_training_fails_the_attempt_and_the_next_ends_in_the_same_bytes(
    volume: Volume, undisturbed: dict[str, bytes], what: str
) -> None:
    run = new_run(volume, "filled", VALUES)
    ballast = Ballast(volume)
    process = start(run, 1)
    stream = events(process)
    next(event for event in stream if event["type"] == "checkpoint" and event["step"] >= 20)
    if what == "bytes":
        # A line of progress has room, a checkpoint has none.
        ballast.take_bytes(but=2**15)
    else:
        # The directory and some files of a checkpoint fit: the save fails in the middle.
        ballast.take_files(but=3)
    (*_, last) = stream
    assert process.wait(240) == 0
    assert (last["outcome"], last["error"]) == ("failed", "VolumeUnavailable"), last
    assert "\n" not in last["message"]
    says = "MB free: make room, or keep fewer with --keep-last" if what == "bytes" else "No space left on device"
    assert says in last["message"]
    assert left_behind(run) == []
    there = list_checkpoints(run)
    for checkpoint in there:
        verify(checkpoint)
    assert read_pointer(run, "latest") in there
    ballast.make_room()
    process = start(run, 2)
    told = list(events(process))
    process.wait(240)
    assert told[-1]["outcome"] == "succeeded", (told[-1], (run / "log.txt").read_text()[-2000:])
    assert next(event["step"] for event in told if event["type"] == "started") >= 20
    assert end_state(run) == undisturbed


def test_a_volume_that_is_full_before_the_first_step_is_told_at_once(volume: Volume) -> None:
    run = new_run(volume, "full", VALUES)
    ballast = Ballast(volume)
    # The text and the log can be read and written, and a checkpoint could not.
    ballast.take_bytes(but=600_000)
    process = start(run, 1)
    told = list(events(process))
    process.wait(240)
    assert [event["type"] for event in told] == ["ended"]
    assert (told[0]["outcome"], told[0]["error"]) == ("failed", "VolumeUnavailable")
    assert "a checkpoint of " in told[0]["message"]
    assert told[0]["message"].endswith("0.5 MB free: make room, or keep fewer with --keep-last"), told[0]["message"]
    assert list_checkpoints(run) == []
    ballast.make_room()
    finish(run, 2)
