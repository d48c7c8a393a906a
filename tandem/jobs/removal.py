"""Removing ended runs from the volume."""

import shutil
from typing import TYPE_CHECKING

from tandem.checkpoints.pins import locked_pins
from tandem.checkpoints.protection import pins_in_force
from tandem.errors import Conflict
from tandem.jobs.runs import find_run
from tandem.volume import Volume, volume_errors

if TYPE_CHECKING:
    from pathlib import Path

    from tandem.jobs.store import JobStore


def remove_run(run_id: str, volume: Volume, store: "JobStore | None", force: bool = False) -> str:
    """Remove the directory of a run that has ended; return its id.

    Raises Conflict if it has not, and, unless `force`, if a version of the registry or a run that has not ended refers
    to one of its checkpoints.
    """
    record = find_run(run_id, volume, store)
    if not record.state.is_terminal:
        raise Conflict(f"run {record.run_id} is {record.state}; 'tandem runs cancel' ends it first")
    run = volume.run(record.run_id)
    with volume_errors(run), locked_pins(run):
        if not force:
            _check_unpinned(record.run_id, volume)
        _remove(run)
    if store is not None:
        store.forget(record.run_id)
    return record.run_id


def _check_unpinned(run_id: str, volume: Volume) -> None:
    pins = pins_in_force(volume, run_id)
    if pins.in_force:
        users = ", ".join(sorted({f"{pin.by} {pin.who}" for pin in pins.in_force}))
        raise Conflict(f"run {run_id} is needed by {users}; --force removes it all the same")
    if damaged := [*pins.unreadable, *pins.unreadable_versions]:
        raise Conflict(f"whether run {run_id} is needed can't be told: {damaged[0]} can't be read; --force removes it")


def _remove(run: "Path") -> None:
    # Its record goes first: what is left after a kill is no run.
    doomed = run.with_name(f".gone-{run.name}")
    run.rename(doomed)
    shutil.rmtree(doomed)
