"""Runs that wait for others: chains, and sweeps of which only so many may run at a time."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from tandem.errors import Conflict, RunNotFound, VolumeUnavailable
from tandem.jobs import record as machine
from tandem.jobs.record import JobRecord, State
from tandem.jobs.runs import mirror, read_mirror
from tandem.jobs.store import JobStore
from tandem.volume import Volume

_ACTIVE = (State.QUEUED, State.RUNNING)


def is_ready(record: JobRecord, others: Mapping[str, JobRecord], num_active: Mapping[str, int]) -> bool:
    """Return whether a WAITING run may be queued, given those it waits for and how many of each sweep are active."""
    if any(others[run_id].state is not State.SUCCEEDED for run_id in record.after):
        return False
    if record.sweep is None or record.max_parallel is None:
        return True
    return num_active.get(record.sweep, 0) < record.max_parallel


def hopeless(record: JobRecord, others: Mapping[str, JobRecord]) -> str:
    """Return why a WAITING run can never be queued; empty while it can."""
    for run_id in record.after:
        if run_id not in others:
            return f"run {run_id}, which it waited for, is gone"
        if others[run_id].state in (State.FAILED, State.CANCELED):
            return f"run {run_id}, which it waited for, is {others[run_id].state}"
    return ""


def release_ready(volume: Volume, store: JobStore, send: Callable[[JobRecord], None]) -> int:
    """Queue the WAITING runs whose time has come, and cancel those whose can't; return how many were changed.

    One process at a time does it; whoever finds it being done leaves it, since the reapers come by again.
    """
    if not store.runs_in(State.WAITING):
        return 0
    with store.lock("release") as held:
        return _release(volume, store, send) if held else 0


def _release(volume: Volume, store: JobStore, send: Callable[[JobRecord], None]) -> int:
    waiting = list(store.get_many(store.runs_in(State.WAITING)).values())
    others = _records(waiting, volume, store)
    num_active = Counter(each.sweep for each in others.values() if each.sweep and each.state in _ACTIVE)
    changed = 0
    for record in sorted(waiting, key=lambda each: each.run_id):
        why = hopeless(record, others)
        if not why and not is_ready(record, others, num_active):
            continue
        try:
            after = store.update(record.run_id, partial(_next, why=why))
        except (Conflict, RunNotFound):
            # Canceled, paused or removed meanwhile.
            continue
        others[record.run_id] = after
        if after.sweep and after.state in _ACTIVE:
            num_active[after.sweep] += 1
        changed += 1
        with suppress(VolumeUnavailable):
            mirror(volume, after)
        if after.state is State.QUEUED:
            send(after)
    return changed


def _next(record: JobRecord, why: str) -> JobRecord:
    return machine.cancel(record, why) if why else machine.release(record)


def _records(waiting: list[JobRecord], volume: Volume, store: JobStore) -> dict[str, JobRecord]:
    """Return the records that decide over the waiting ones: those before them, and those of their sweeps."""
    wanted = {run_id for record in waiting for run_id in record.after}
    for sweep in {record.sweep for record in waiting if record.sweep}:
        wanted.update(store.runs_of_sweep(sweep))
    found = store.get_many(sorted(wanted))
    for run_id in wanted - found.keys():
        # Its record has expired in the broker; the volume keeps it.
        if (mirrored := read_mirror(volume.run(run_id))) is not None:
            found[run_id] = mirrored
    return found
