"""Which pins of a run are in force: what of it must not be removed, since something else refers to it."""

import json
from dataclasses import dataclass
from pathlib import Path

from tandem.checkpoints.pins import Pin, model_pin_file, read_pin
from tandem.checkpoints.version import read_version
from tandem.errors import CheckpointCorrupt
from tandem.jobs.record import State
from tandem.volume import Volume

# As `tandem.jobs.runs` has it, which knows of Redis too.
_RECORD_FILE = "record.json"


@dataclass(frozen=True)
class Pins:
    """What was found of a run: pins that hold, files of pins that no longer do, and what could not be read.

    With a file in `unreadable`, a damaged pin of this run, nobody knows what of the run is needed: all of it is. A
    version in `unreadable_versions`, of whatever run, can't be served; if it is of this run, its own pin holds all the
    same, unless it was published before there were pins.
    """

    in_force: tuple[Pin, ...]
    stale: tuple[Path, ...]
    unreadable: tuple[Path, ...]
    unreadable_versions: tuple[Path, ...]

    @property
    def steps(self) -> set[int]:
        """The steps of the checkpoints that are pinned."""
        return {pin.step for pin in self.in_force}


def pins_in_force(volume: Volume, run_id: str) -> Pins:
    """Return the pins of a run; a version of the registry holds its checkpoint though it may have no pin.

    Hold `locked_pins` from here until what is not pinned has been removed. A pin by a run holds until that run's
    record is terminal, and while the record can't be read; a pin by a version, unless the registry has another
    checkpoint under its number.
    """
    held: dict[str, Pin] = {}
    stale, unreadable = [], []
    for path in sorted((volume.run(run_id) / "pins").glob("*.json")):
        try:
            pin = read_pin(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            unreadable.append(path)
            continue
        if _holds(pin, run_id, volume):
            held[pin.file] = pin
        else:
            stale.append(path)
    versions, unreadable_versions = _versions(run_id, volume)
    return Pins(tuple({**versions, **held}.values()), tuple(stale), tuple(unreadable), unreadable_versions)


def _holds(pin: Pin, run_id: str, volume: Volume) -> bool:
    if pin.by == "run":
        return not _is_over(volume.run(pin.who))
    name, number = pin.version
    path = volume.model(name) / "versions" / f"{number:04d}.json"
    try:
        version = read_version(path)
    except CheckpointCorrupt:
        # Damaged, or about to be published.
        return True
    return (version.run_id, Path(version.checkpoint).name) == (run_id, pin.checkpoint)


def _is_over(run: Path) -> bool:
    try:
        return State(json.loads((run / _RECORD_FILE).read_bytes())["state"]).is_terminal
    except FileNotFoundError:
        # A run that is being submitted has a directory before it has a record.
        return not run.is_dir()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _versions(run_id: str, volume: Volume) -> tuple[dict[str, Pin], tuple[Path, ...]]:
    found, unreadable = {}, []
    for path in sorted(volume.models.glob("*/versions/[0-9]*.json")):
        try:
            version = read_version(path)
        except CheckpointCorrupt:
            unreadable.append(path)
            continue
        if version.run_id == run_id:
            pin = Pin(Path(version.checkpoint).name, "model", f"{version.name}:{version.version}")
            found[model_pin_file(version.name, version.version)] = pin
    return found, tuple(unreadable)
