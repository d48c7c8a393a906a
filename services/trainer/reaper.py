"""The reaper, in every worker: finds runs that nobody carries and no message will wake, and sends them again."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from tandem.errors import BrokerUnavailable, Conflict, VolumeUnavailable
from tandem.jobs import record as machine
from tandem.jobs.queue import priority_keys
from tandem.jobs.record import JobRecord, State
from tandem.jobs.runs import mirror, read_mirror
from tandem.jobs.store import JobStore
from tandem.volume import Volume

log = logging.getLogger(__name__)

# A message can be taken from the queue and not yet be noted as unacknowledged (kombu #305); that gap is milliseconds.
_WAITING_S = 10.0


class Reaper:
    """Sweeps the live runs of one broker; `send` wakes a worker for a record."""

    def __init__(self, store: JobStore, volume: Volume, lease_s: float, send: Callable[[JobRecord], None]) -> None:
        self._store = store
        self._volume = volume
        self._lease_s = lease_s
        self._send = send

    def restore(self) -> int:
        """Give a broker that has lost its data the unfinished runs of the volume; return how many."""
        if self._store.remembers():
            return 0
        restored = 0
        for run in sorted(self._volume.runs.glob("*/record.json")):
            record = read_mirror(run.parent)
            if record is not None and not record.state.is_terminal and self._store.create(record):
                log.info("run %s of the volume is back in the broker", record.run_id)
                restored += 1
        self._store.remember()
        return restored

    def sweep(self) -> int:
        """Requeue what was lost; return how many runs that were. Does nothing while the broker is away."""
        try:
            self.restore()
            # Leases may have lapsed while the broker was down and their holders could not renew them.
            if self._store.uptime_s() < 2 * self._lease_s:
                return 0
            return sum(self._rescue(run_id) for run_id in self._store.live())
        except (BrokerUnavailable, VolumeUnavailable) as error:
            log.warning("no sweep: %s", error)
            return 0

    def _rescue(self, run_id: str) -> bool:
        record = self._store.get(run_id)
        if record is None or self._store.has_lease(run_id):
            return False
        if record.state is State.RUNNING:
            return self._requeue(record)
        if record.state is State.QUEUED and _age_s(record) > _WAITING_S and not self._has_messages(record.queue):
            log.warning("run %s waited with no message: sent again", run_id)
            self._send(record)
            return True
        return False

    def _has_messages(self, queue: str) -> bool:
        return self._store.count_messages(priority_keys(queue)) > 0

    def _requeue(self, record: JobRecord) -> bool:
        try:
            after = self._store.update(
                record.run_id,
                lambda current: machine.requeue(current, "its worker was lost", counts=True),
                attempt=record.attempt,
            )
        except Conflict:
            # Someone else was quicker.
            return False
        log.warning("run %s lost its worker: %s", record.run_id, after.state)
        mirror(self._volume, after)
        if after.state is State.QUEUED:
            self._send(after)
        return True


def _age_s(record: JobRecord) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(record.updated_at)).total_seconds()
