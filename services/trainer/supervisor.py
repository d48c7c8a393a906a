"""The supervisor: a small loop in the Celery child that holds a run while its training process computes.

It takes the lease, begins the attempt (whose number fences off every earlier one, in Redis and on the volume), has it
computed (`services.trainer.attempt`), and says what became of the run. It imports no torch. Redis may go away
meanwhile: the run goes on, and what could not be written is written when it comes back.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

from services.trainer.attempt import RENEWALS, Attempt
from services.trainer.holder import Holder, end_previous
from services.trainer.metrics import NO_METER, Meter
from services.trainer.process import Spare
from services.trainer.reaper import wake_again
from services.trainer.stored_runs import StoredRuns
from tandem.errors import BrokerUnavailable, Conflict, VolumeUnavailable
from tandem.jobs import record as machine
from tandem.jobs.chains import release_ready
from tandem.jobs.failures import Failure, failure_of
from tandem.jobs.fence import Fence
from tandem.jobs.record import JobRecord, State
from tandem.jobs.runs import mirror, read_mirror
from tandem.jobs.store import JobStore
from tandem.logs import run_logger
from tandem.volume import Volume

log = logging.getLogger(__name__)

# A step that takes longer has hung, on a volume that is gone say: the run is for another worker.
_HANGS_AFTER_S = 600.0


class Outcome(Enum):
    """What became of the message: UNMOVED if it was for a run that is over, or another's."""

    UNMOVED = auto()
    DONE = auto()
    DRAINED = auto()


@dataclass(frozen=True)
class Patience:
    """How long things may take, in seconds: a lease that is not renewed, and a process that was asked to stop."""

    lease_s: float
    stop_grace_s: float


class Supervisor:
    """Carries runs of one volume and one broker; built once in a worker, used by each of its children."""

    def __init__(
        self,
        store: JobStore,
        volume: Volume,
        patience: Patience,
        spare: Spare,
        send: Callable[[JobRecord], None],
        is_draining: Callable[[], bool],
        meter: Meter = NO_METER,
    ) -> None:
        self.store = store
        self.volume = volume
        self.patience = patience
        self.spare = spare
        self.is_draining = is_draining
        self._send = send
        self.meter = meter
        self.stored = StoredRuns(volume)
        self._complaint = ""
        # When the attempt last went on.
        self.alive_at = time.monotonic()

    def carry(self, run_id: str) -> Outcome:
        """Carry the run to its end, to its next wait, or until the worker drains."""
        record = self.store.get(run_id) or self._restored(run_id)
        if record is None or (record.state is not State.QUEUED and record.state is not State.RUNNING):
            return Outcome.UNMOVED
        token = f"{Holder.of(os.getpid()).token()}/{secrets.token_hex(8)}"
        if not self.store.acquire_lease(run_id, token, self.patience.lease_s):
            # Another worker holds it; should that worker die, the reaper sends a new message.
            return Outcome.UNMOVED
        try:
            with self._keeping(run_id, token):
                return self._attempts(run_id, token)
        except Conflict as error:
            run_logger(log, run_id).warning("left run %s: %s", run_id, error)
            return Outcome.DONE
        finally:
            self.patiently(lambda: self.store.release_lease(run_id, token))
            self.patiently(lambda: self._see_to_what_follows(run_id))

    def _restored(self, run_id: str) -> JobRecord | None:
        record = read_mirror(self.volume.run(run_id))
        if record is not None:
            self.store.create(record)
        return record

    def _attempts(self, run_id: str, token: str) -> Outcome:
        while True:
            record = self._begin(run_id)
            if record.state is State.RUNNING:
                record = self._measured_attempt(record, token)
            if not self.patiently(partial(mirror, self.volume, record)):
                self.patiently(partial(self.store.add_unmirrored, run_id))
            if record.state is State.QUEUED and self.is_draining():
                return Outcome.DRAINED
            if record.state is not State.QUEUED or record.delayed:
                return Outcome.DONE

    def _see_to_what_follows(self, run_id: str) -> None:
        """Begin the backoff of a run that waits for its next attempt, or wake the runs that waited for this one."""
        record = self.store.get(run_id)
        if record is not None and record.state is State.QUEUED and record.delayed:
            wake_again(record, self.store, self._send)
        elif record is not None and record.state.is_settled:
            release_ready(self.volume, self.store, self._send)

    def _measured_attempt(self, record: JobRecord, token: str) -> JobRecord:
        self.meter.attempt_began()
        began, outcome = time.monotonic(), "abandoned"
        try:
            record = self._attempt(record, token)
            outcome = record.state.lower()
            if record.state is State.QUEUED:
                outcome = "stopped" if record.error is Failure.PREEMPTED else "lost"
            return record
        finally:
            self.meter.attempt_ended(outcome, time.monotonic() - began)

    def _begin(self, run_id: str) -> JobRecord:
        fence = self._fence_number(run_id)

        def change(record: JobRecord) -> JobRecord:
            if record.state is State.RUNNING:
                # We hold the lease, so whoever ran it has died.
                record = machine.requeue(record, "its worker was lost", Failure.WORKER_LOST)
            return machine.start(record, fence) if record.state is State.QUEUED and not record.delayed else record

        return self.store.update(run_id, change)

    def _fence_number(self, run_id: str) -> int:
        try:
            return Fence(self.volume.run(run_id)).number()
        except VolumeUnavailable:
            # The attempt is about to find that out, and the record to say it.
            return 0

    def _attempt(self, record: JobRecord, token: str) -> JobRecord:
        run = self.volume.run(record.run_id)
        try:
            self.stored.bring(record, goes_on=self._goes_on)
            end_previous(run)
            Fence(run).raise_to(record.attempt, while_waiting=lambda: self.renew(record.run_id, token))
            mirror(self.volume, record)
            return Attempt(self, record, token).carry()
        except (OSError, VolumeUnavailable) as error:
            # The volume is full, read-only or gone: the record says so, since the run directory can't.
            trouble = partial(machine.requeue, message=f"the volume can't be used: {error}", failure=Failure.VOLUME)
            return self.store.update(record.run_id, trouble, record.attempt)
        except (Conflict, BrokerUnavailable):
            raise
        except Exception as error:  # whatever it is, the run ends with a line
            log.exception("run %s: attempt %d failed", record.run_id, record.attempt, extra={"run_id": record.run_id})
            failed = partial(machine.fail, message=str(error), error=failure_of(type(error).__name__))
            return self.store.update(record.run_id, failed, record.attempt)

    def _goes_on(self) -> None:
        self.alive_at = time.monotonic()

    def renew(self, run_id: str, token: str) -> None:
        """Prolong the lease; raise Conflict if another worker has it."""
        is_ours = False
        try:
            is_ours = self.store.renew_lease(run_id, token, self.patience.lease_s)
        finally:
            if not is_ours:
                self.meter.lease_missed()
        if not is_ours:
            raise Conflict(f"the lease of run {run_id} is another's")

    @contextmanager
    def _keeping(self, run_id: str, token: str) -> Iterator[None]:
        """Renew the lease from a thread too: on a slow volume, a step or the check of large files may outlast it."""
        over = threading.Event()

        def keep() -> None:
            is_ours = True
            # That it is another's is for the next tick to say, and for the fence.
            while is_ours and not over.wait(self.patience.lease_s / RENEWALS):
                is_ours = time.monotonic() - self.alive_at < _HANGS_AFTER_S
                with suppress(BrokerUnavailable):
                    is_ours = is_ours and self.store.renew_lease(run_id, token, self.patience.lease_s)

        self.alive_at = time.monotonic()
        keeper = threading.Thread(target=keep, name=f"keeper-{run_id}", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()

    def patiently(self, action: Callable[[], object]) -> bool:
        """Do what broker or volume may refuse for a while: never fatal for a run that computes. Say if it is done."""
        try:
            action()
            return True
        except (BrokerUnavailable, VolumeUnavailable, OSError) as error:
            # This is tried again several times a second; the log needs it once.
            if str(error) != self._complaint:
                log.warning("for now: %s", error)
            self._complaint = str(error)
            return False
