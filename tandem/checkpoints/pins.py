"""Pins: files in a run's directory that keep one of its checkpoints from being removed.

    runs/<run_id>/pins/model-<name>-<version>.json    {"checkpoint": "step-00001234", "by": "model", "who": "name:3"}
                       <other run_id>.json            {"checkpoint": "step-00001234", "by": "run", "who": run_id}

A pin is written before what refers to the checkpoint. Whoever pins and whoever removes take turns (`locked_pins`), so
that a checkpoint is either seen to be gone by the one, or seen to be pinned by the other. `protection` says which hold.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from tandem.checkpoints.files import list_checkpoints, step_of
from tandem.errors import ModelNotFound, RunNotFound, TandemError
from tandem.names import check_name
from tandem.volume import replace_json, volume_errors


@dataclass(frozen=True)
class Pin:
    """Who needs which checkpoint: a version of a model, as name:version, or a run, by its id."""

    checkpoint: str
    by: Literal["model", "run"]
    who: str

    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return step_of(Path(self.checkpoint))

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.who}.json" if self.by == "run" else model_pin_file(*self.version)

    @property
    def version(self) -> tuple[str, int]:
        """Name and version of the model that a pin by a model is for; ValueError where `who` is none."""
        name, _, number = self.who.partition(":")
        return check_name(name, "model"), int(number)


_PIN = TypeAdapter(Pin)


def model_pin_file(name: str, version: int) -> str:
    """Return the name of the file of a version's pin."""
    return f"model-{name}-{version:04d}.json"


def pin(checkpoint: Path, by: Literal["model", "run"], who: str) -> None:
    """Keep `checkpoint` for `who`; raise ModelNotFound, leaving no pin, if it is no longer there."""
    run = checkpoint.parent.parent
    made = Pin(checkpoint.name, by, who)
    with locked_pins(run), volume_errors(run):
        if not checkpoint.is_dir():
            steps = ", ".join(str(step_of(each)) for each in list_checkpoints(run)) or "none"
            raise ModelNotFound(
                f"run:{run.name}/{made.step} has been removed (--keep-last of that run); steps there: {steps}"
            )
        replace_json(run / "pins" / made.file, asdict(made))


def read_pin(path: Path) -> Pin:
    """Read a pin; raise OSError or ValueError if it can't be read, or is not what its file's name says."""
    found = _PIN.validate_json(path.read_bytes(), strict=True)
    try:
        step_of(Path(found.checkpoint))
        check_name(found.who if found.by == "run" else found.version[0], found.by)
    except TandemError as error:
        raise ValueError(str(error)) from error
    if found.file != path.name:
        raise ValueError(f"{path.name} is the name of another's pin")
    return found


@contextmanager
def locked_pins(run: Path) -> Iterator[None]:
    """Let one process at a time pin or remove checkpoints of a run; the kernel drops the lock with its holder.

    Raises RunNotFound where the run's directory is gone, VolumeUnavailable where the lock can't be made.
    """
    if not run.is_dir():
        raise RunNotFound(f"no run {run.name!r} on the volume; 'tandem runs list' shows them")
    with volume_errors(run):
        (run / "pins").mkdir(exist_ok=True)
        lock = open(run / "pins" / ".lock", "a")  # noqa: SIM115
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
