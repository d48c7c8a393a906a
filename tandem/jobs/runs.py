"""Runs as people see them: list, find, cancel, pause, resume.

The volume holds them all; Redis knows more while it is up.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.errors import BrokerUnavailable, RunNotFound
from tandem.jobs import record as machine
from tandem.jobs.fence import Fence
from tandem.jobs.record import JobRecord, State
from tandem.volume import Volume, replace_json, volume_errors

if TYPE_CHECKING:
    # Neither is imported to list runs.
    from celery import Celery

    from tandem.jobs.store import JobStore

RECORD_FILE = "record.json"
SPEC_FILE = "job.json"
# What a run of each kind makes.
MODEL_KINDS = {"train_classifier": "classifier", "train_language_model": "language_model"}


def mirror(volume: Volume, record: JobRecord, durable: bool = True) -> None:
    """Write the record to its run directory, so that the volume alone can tell it; a newer one there stays."""
    run = volume.run(record.run_id)
    with volume_errors(run), Fence(run).locked():
        there = read_mirror(run)
        if there is None or there.revision <= record.revision:
            replace_json(run / RECORD_FILE, record.model_dump(mode="json"), durable)


def read_mirror(run: Path) -> JobRecord | None:
    """Return the record in a run directory, None where there is no readable one."""
    try:
        return JobRecord.model_validate_json((run / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def run_ids(volume: Volume) -> list[str]:
    """Return the runs of the volume, newest first."""
    try:
        # Ten thousand names in 4 ms; as paths in 11.
        names = os.listdir(volume.runs)  # noqa: PTH208
    except FileNotFoundError:
        return []
    # What begins with a dot is being removed.
    return sorted((name for name in names if not name.startswith(".")), reverse=True)


def list_runs(
    volume: Volume, open_store: "Callable[[], JobStore | None]", limit: int | None = None, sweep: str | None = None
) -> list[JobRecord]:
    """Return the newest `limit` runs (of a sweep), newest first: from the volume, brought up to date from Redis.

    The store is opened only if a run is unfinished: importing redis takes half the time of `tandem runs list`.
    """
    mirrors: dict[str, JobRecord] = {}
    for run_id in run_ids(volume):
        if limit is not None and len(mirrors) >= limit:
            break
        record = read_mirror(volume.runs / run_id)
        if record is not None and sweep in (None, record.sweep):
            mirrors[run_id] = record
    # A terminal state never changes by itself, so only the others are asked for.
    open_ids = [run_id for run_id, record in mirrors.items() if not record.state.is_terminal]
    fresh = _from_broker(open_ids, open_store) if open_ids else {}
    return [_newer(record, fresh.get(run_id)) for run_id, record in mirrors.items()]


def _newer(mirrored: JobRecord, fresh: JobRecord | None) -> JobRecord:
    return mirrored if fresh is None or fresh.revision < mirrored.revision else fresh


def _from_broker(run_ids: list[str], open_store: "Callable[[], JobStore | None]") -> dict[str, JobRecord]:
    store = open_store()
    try:
        return {} if store is None else store.get_many(run_ids)
    except BrokerUnavailable:
        return {}


def find_run(run_id: str, volume: Volume, store: "JobStore | None") -> JobRecord:
    """Return the newest record of a run; `latest` names the newest run. Raises RunNotFound."""
    if run_id == "latest":
        runs = list_runs(volume, lambda: store, limit=1)
        if not runs:
            raise RunNotFound("there are no runs yet; 'tandem train' submits one")
        return runs[0]
    mirrored = read_mirror(volume.run(run_id))
    record = mirrored
    if store is not None and (mirrored is None or not mirrored.state.is_terminal):
        try:
            fresh = store.get(run_id)
            record = fresh if mirrored is None else _newer(mirrored, fresh)
        except BrokerUnavailable:
            record = mirrored
    if record is None:
        raise RunNotFound(f"no run {run_id!r} on the volume; 'tandem runs list' shows them")
    return record


def cancel(run_id: str, volume: Volume, store: "JobStore") -> JobRecord:
    """Ask for the end of a run: at once where nothing runs, else after saving a checkpoint."""
    return _change(run_id, machine.request_cancel, volume, store)


def pause(run_id: str, volume: Volume, store: "JobStore") -> JobRecord:
    """Ask a run to give its place back: at once where it waits, else after saving a checkpoint."""
    return _change(run_id, machine.request_pause, volume, store)


def resume(run_id: str, volume: Volume, store: "JobStore", app: "Celery") -> JobRecord:
    """Put a failed, canceled or paused run back into its queue; it goes on from its newest checkpoint."""
    from tandem.jobs.chains import release_ready
    from tandem.jobs.queue import send_run

    _pin_again(find_run(run_id, volume, store), volume)
    record = _change(run_id, machine.resume, volume, store)
    # Until now the run was over, and its pins might be removed.
    _pin_again(record, volume)
    if record.state is State.QUEUED:
        send_run(app, record)
    else:
        release_ready(volume, store, lambda ready: send_run(app, ready))
    return find_run(record.run_id, volume, store)


def _change(run_id: str, change: Callable[[JobRecord], JobRecord], volume: Volume, store: "JobStore") -> JobRecord:
    record = find_run(run_id, volume, store)
    # A volume that can't be written is found before the state changes.
    mirror(volume, record)
    # A broker that has lost its data is given the record back first.
    store.put_newer(record)
    record = store.update(record.run_id, change)
    mirror(volume, record)
    return record


def _pin_again(record: JobRecord, volume: Volume) -> None:
    # The specs take as long to import as all else that lists runs.
    from tandem.jobs.references import pin_references
    from tandem.jobs.spec import parse_spec

    path = volume.run(record.run_id) / SPEC_FILE
    if path.is_file():
        pin_references(parse_spec(path.read_bytes()), record.run_id, volume)
