"""The reaper, in every worker: finds runs that nobody carries and no message will wake, and sees to them.

Times are those of its own monotonic clock, or of Redis: no host's clock matters.
"""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from services.trainer.holder import parse_token
from tandem.errors import BrokerUnavailable, Conflict, RunNotFound, VolumeUnavailable
from tandem.jobs import record as machine
from tandem.jobs.chains import release_ready
from tandem.jobs.failures import Failure, backoff_s
from tandem.jobs.fence import Fence
from tandem.jobs.queue import priority_keys, run_of_message
from tandem.jobs.record import JobRecord, State
from tandem.jobs.runs import mirror, read_mirror, run_ids
from tandem.jobs.store import JobStore
from tandem.logs import run_logger
from tandem.volume import Volume

log = logging.getLogger(__name__)

# A message can be taken from the queue and not yet be noted as unacknowledged (kombu #305); that gap is milliseconds.
_WAITING_S = 10.0
# A holder renews five times in a lease; where Redis' clock jumps and all leases lapse at once, it comes back in this.
_MISSING_LEASES = 0.3


class Reaper:
    """Sweeps the live runs of one broker; `send` wakes a worker for a record."""

    def __init__(
        self,
        store: JobStore,
        volume: Volume,
        lease_s: float,
        send: Callable[[JobRecord], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._volume = volume
        self._lease_s = lease_s
        self._send = send
        self._clock = clock
        # Since when what was found amiss has been so, by run and by what it is.
        self._since: dict[tuple[str, str], float] = {}
        # What was last said of a run that could not be seen to; the log needs it once.
        self._told: dict[str, str] = {}

    def reconcile(self, life: str) -> int:
        """Give a broker that has come back what it has forgotten of the volume's runs; return how many these are.

        All of it, if it lost its data; the last second, if it was killed (its file is synced each second).
        """
        if self._store.reconciled() == life:
            return 0
        there = [read_mirror(self._volume.runs / run_id) for run_id in run_ids(self._volume)]
        known = self._store.get_many(record.run_id for record in there if record is not None)
        restored = 0
        for record in there:
            if record is None:
                continue
            current = known.get(record.run_id)
            is_forgotten = current is None and not record.state.is_terminal
            is_newer = current is not None and current.revision < record.revision
            if (is_forgotten or is_newer) and self._store.put_newer(record):
                run_logger(log, record.run_id).info("run %s of the volume is back in the broker", record.run_id)
                restored += 1
        self._store.set_reconciled(life)
        return restored

    def sweep(self) -> int:
        """See to what was lost; return how many runs that were. Does nothing while the broker is away."""
        try:
            life, uptime_s = self._store.life()
            self.reconcile(life)
            rescued = self._each(self._store.unmirrored(), self._mirror_missing)
            rescued += release_ready(self._volume, self._store, self._send)
            for queue in self._store.queues():
                rescued += self._each(self._store.due(queue), self._end_delay)
                rescued += self._wake_queue(queue)
            # Leases may have lapsed while the broker was down and their holders could not renew them.
            if uptime_s >= 2 * self._lease_s:
                rescued += self._rescue_lost()
            return rescued
        except (BrokerUnavailable, VolumeUnavailable) as error:
            log.warning("no sweep: %s", error)
            return 0

    def _each(self, run_ids: Iterable[str], see_to: Callable[[str], bool]) -> int:
        """See to each of these runs; one that can't be seen to keeps none of the others waiting."""
        seen_to = 0
        for run_id in run_ids:
            try:
                seen_to += see_to(run_id)
            except (VolumeUnavailable, RunNotFound, Conflict) as error:
                if self._told.get(run_id) != str(error):
                    run_logger(log, run_id).warning("run %s: %s", run_id, error)
                self._told[run_id] = str(error)
        return seen_to

    def _mirror_missing(self, run_id: str) -> bool:
        record = self._store.get(run_id)
        # A run whose directory is gone has been removed by hand.
        if record is not None and self._volume.run(run_id).is_dir():
            mirror(self._volume, record)
        self._store.drop_unmirrored(run_id)
        return False

    def _lasts(self, run_id: str, what: str, is_so: bool, seconds: float) -> bool:
        """Return whether `what` has been so of the run for `seconds`, in each sweep of that time."""
        if not is_so:
            self._since.pop((run_id, what), None)
            return False
        began = self._since.setdefault((run_id, what), self._clock())
        if self._clock() - began < seconds:
            return False
        del self._since[run_id, what]
        return True

    def _rescue_lost(self) -> int:
        running = self._store.runs_in(State.RUNNING)
        # All at once, since every worker asks once a second: a thousand one by one took a worker 168 ms each time.
        held = self._store.held_leases(running)
        for run_id in held:
            self._lasts(run_id, "lost", False, 0.0)
        # One whose holder is of this machine may be found to have died before its lease has.
        doubtful = [run_id for run_id in running if run_id not in held or _is_gone(held[run_id])]
        return self._each(doubtful, self._rescue)

    def _rescue(self, run_id: str) -> bool:
        token = self._store.lease(run_id)
        if token is not None and _is_gone(token):
            # Its holder died on this machine: no need to wait until its lease has lapsed.
            self._store.release_lease(run_id, token)
        elif not self._lasts(run_id, "lost", token is None, _MISSING_LEASES * self._lease_s):
            return False
        record = self._store.get(run_id)
        return record is not None and record.state is State.RUNNING and self._requeue(record)

    def _requeue(self, record: JobRecord) -> bool:
        lost = partial(machine.requeue, message="its worker was lost", failure=Failure.WORKER_LOST)
        try:
            after = self._store.update(record.run_id, lost, attempt=record.attempt)
        except Conflict:
            # Someone else was quicker.
            return False
        self._fence_off(record)
        run_logger(log, record.run_id).warning("run %s lost its worker: %s", record.run_id, after.state)
        wake_again(after, self._store, self._send)
        mirror(self._volume, after)
        return True

    def _fence_off(self, record: JobRecord) -> None:
        """Let the lost attempt write nothing more, though none may follow it: its process may only be frozen."""
        run = self._volume.run(record.run_id)
        with suppress(VolumeUnavailable):
            Fence(run).close(record.attempt)

    def _wake_queue(self, queue: str) -> int:
        """Wake the runs of a queue whose messages are lost."""
        keys = priority_keys(queue)
        # Most of the time there is a message for each that is not to wait, and no need to look closer.
        waiting = self._store.count_queued(queue) - self._store.count_delayed(queue)
        if waiting <= sum(self._store.count_messages(keys)):
            return 0
        queued = self._store.runs_in(State.QUEUED, queue)
        sent = {run_of_message(message) for message in self._store.messages(keys)}
        records = self._store.get_many(run_id for run_id in queued if run_id not in sent)
        return sum(self._wake(record) for record in records.values())

    def _wake(self, record: JobRecord) -> bool:
        if record.state is not State.QUEUED:
            return False
        if record.delayed:
            # Begun already, unless whoever requeued it died before it could.
            wake_again(record, self._store, self._send)
            return False
        is_unseen = self._store.lease(record.run_id) is None
        if not self._lasts(record.run_id, "unsent", is_unseen, _WAITING_S):
            return False
        run_logger(log, record.run_id).warning("run %s waited with no message: sent again", record.run_id)
        self._send(record)
        return True

    def _end_delay(self, run_id: str) -> bool:
        record = self._store.get(run_id)
        if record is None or not record.delayed:
            # Canceled, paused or removed meanwhile.
            self._store.drop_delay(run_id)
            return False
        after = self._store.update(run_id, machine.release)
        self._store.drop_delay(run_id)
        self._send(after)
        return True


def _is_gone(token: str) -> bool:
    holder = parse_token(token)
    return holder is not None and holder.is_known_gone()


def wake_again(record: JobRecord, store: JobStore, send: Callable[[JobRecord], None]) -> None:
    """See that a requeued run is woken: at once, or by a reaper after its backoff."""
    if record.state is not State.QUEUED:
        return
    if record.delayed:
        assert record.error is not None
        store.delay(record.run_id, record.queue, backoff_s(record.error, record.failures))
    else:
        send(record)
