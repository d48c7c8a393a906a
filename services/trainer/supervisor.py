"""The supervisor: a small loop in the Celery child that holds a run while its training process computes.

It takes the lease, begins the attempt (whose number fences off every earlier one), starts the process, pumps its events
to Redis and to the run directory, renews the lease, and watches for cancel and drain. It imports no torch. Redis may go
away meanwhile: the run goes on, and what could not be written is written when it comes back.
"""

import json
import logging
import secrets
import time
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import IO, Any

from services.trainer.process import LOG_FILE, TrainingProcess, training_command
from services.trainer.reporter_files import STATUS_FILE
from tandem.checkpoints.registry import Registry
from tandem.errors import BrokerUnavailable, Conflict, RunNotFound, TandemError, VolumeUnavailable
from tandem.jobs import record as machine
from tandem.jobs.record import JobRecord, Progress, State
from tandem.jobs.runs import MODEL_KINDS, mirror, read_mirror
from tandem.jobs.store import JobStore
from tandem.volume import Volume

log = logging.getLogger(__name__)

_TICK_S = 0.25
_LONGEST_PAUSE_S = 30.0
_DRAIN_PATIENCE_S = 5.0


class Outcome(Enum):
    """What became of the message."""

    DONE = auto()
    DRAINED = auto()


class Supervisor:
    """Carries runs of one volume and one broker; built once in a worker's child."""

    def __init__(
        self,
        store: JobStore,
        volume: Volume,
        lease_s: float,
        stop_grace_s: float,
        is_draining: Callable[[], bool],
    ) -> None:
        self._store = store
        self._volume = volume
        self._lease_s = lease_s
        self._stop_grace_s = stop_grace_s
        self._is_draining = is_draining
        self._complaint = ""

    def carry(self, run_id: str) -> Outcome:
        """Carry the run to its end, or until the worker drains."""
        token = secrets.token_hex(8)
        record = self._store.get(run_id) or self._restored(run_id)
        if record is None or record.state.is_terminal:
            return Outcome.DONE
        if not self._store.acquire_lease(run_id, token, self._lease_s):
            # Another worker holds it; should that worker die, the reaper sends a new message.
            return Outcome.DONE
        try:
            return self._attempts(run_id, token)
        except Conflict as error:
            log.warning("left run %s: %s", run_id, error)
            return Outcome.DONE
        finally:
            self._patiently(lambda: self._store.release_lease(run_id, token))

    def _restored(self, run_id: str) -> JobRecord | None:
        record = read_mirror(self._volume.run(run_id))
        if record is not None:
            self._store.create(record)
        return record

    def _attempts(self, run_id: str, token: str) -> Outcome:
        while True:
            record = self._begin(run_id)
            if not record.state.is_terminal:
                record = self._attempt(record, token)
            if record.state.is_terminal:
                self._patiently(partial(mirror, self._volume, record))
                return Outcome.DONE
            if self._is_draining():
                return Outcome.DRAINED
            # A little patience, more with each attempt, before what failed is tried again.
            self._pause(min(2.0 ** (record.attempt - 1), _LONGEST_PAUSE_S), run_id, token)
            if self._is_draining():
                return Outcome.DRAINED

    def _attempt(self, record: JobRecord, token: str) -> JobRecord:
        try:
            mirror(self._volume, record)
            return _Attempt(self, record, token).carry()
        except (OSError, VolumeUnavailable) as error:
            # The volume is full, read-only or gone: the record says so, since the run directory can't.
            message = f"the volume can't be used: {error}"
            return self._store.update(record.run_id, lambda current: machine.fail(current, message), record.attempt)

    def _begin(self, run_id: str) -> JobRecord:
        def change(record: JobRecord) -> JobRecord:
            if record.state is State.RUNNING:
                # We hold the lease, so whoever ran it has died.
                record = machine.requeue(record, "its worker was lost", counts=True)
            return record if record.state.is_terminal else machine.start(record)

        return self._store.update(run_id, change)

    def _pause(self, seconds: float, run_id: str, token: str) -> None:
        """Wait with the lease held; raise Conflict if it is lost, return early when the worker drains."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._is_draining():
            self._patiently(lambda: self.renew(run_id, token))
            time.sleep(min(_TICK_S, self._lease_s / 5))

    def renew(self, run_id: str, token: str) -> None:
        """Prolong the lease; raise Conflict if another worker has it."""
        if not self._store.renew_lease(run_id, token, self._lease_s):
            raise Conflict(f"the lease of run {run_id} is another's")

    def _patiently(self, action: Callable[[], None]) -> None:
        """Do what broker or volume may refuse for a while; that is never fatal for a run that computes."""
        try:
            action()
        except (BrokerUnavailable, VolumeUnavailable, OSError) as error:
            # This is tried again several times a second; the log needs it once.
            if str(error) != self._complaint:
                log.warning("for now: %s", error)
            self._complaint = str(error)


class _Attempt:
    """One try at a run, from the start of its process to its record's next state."""

    def __init__(self, supervisor: Supervisor, record: JobRecord, token: str) -> None:
        self._s = supervisor
        self._store = supervisor._store
        self._volume = supervisor._volume
        self._record = record
        self._token = token
        self._run: Path = supervisor._volume.run(record.run_id)
        self._renewed_at = 0.0
        self._stop_asked_at: float | None = None
        self._ended: dict[str, Any] | None = None
        self._unsent: Progress | None = None

    def carry(self) -> JobRecord:
        """Run the process to its end; return the record in its next state. Raises Conflict if the lease is lost."""
        log.info("run %s: attempt %d begins", self._record.run_id, self._record.attempt)
        (self._run / STATUS_FILE).unlink(missing_ok=True)
        process = TrainingProcess(training_command(self._run, self._record.attempt), self._run / LOG_FILE)
        try:
            with open(self._run / "events.jsonl", "a", encoding="utf-8") as events:
                while not process.has_ended():
                    for event in process.events(_TICK_S):
                        self._s._patiently(partial(_append, events, event))
                        self._take(event)
                    self._tick(process)
        finally:
            # Whatever happened, nothing of this attempt computes on.
            process.kill()
        return self._conclude(process.ending())

    def _take(self, event: dict[str, Any]) -> None:
        self._s._patiently(lambda: self._store.add_event(self._record.run_id, event))
        if event["type"] == "progress":
            self._unsent = Progress.model_validate(event)
        elif event["type"] == "ended":
            self._ended = event

    def _tick(self, process: TrainingProcess) -> None:
        self._s._patiently(self._renew)
        self._s._patiently(self._send_progress)
        if self._record.cancel_requested or self._s._is_draining():
            self._stop(process)

    def _renew(self) -> None:
        now = time.monotonic()
        if now - self._renewed_at < self._s._lease_s / 5:
            return
        self._s.renew(self._record.run_id, self._token)
        self._renewed_at = now

    def _send_progress(self) -> None:
        """Bring record and mirror up to date; this also reads whether a cancel was asked for."""
        progress = self._unsent
        if progress is None:
            current = self._store.get(self._record.run_id)
            if current is not None and current.attempt == self._record.attempt:
                self._record = current
            return
        self._record = self._update(lambda record: machine.report(record, progress))
        self._unsent = None
        mirror(self._volume, self._record, durable=False)

    def _update(self, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        try:
            return self._store.update(self._record.run_id, change, attempt=self._record.attempt)
        except RunNotFound:
            # The broker has lost its data; this process knows the run.
            self._store.create(self._record)
            return self._store.update(self._record.run_id, change, attempt=self._record.attempt)

    def _stop(self, process: TrainingProcess) -> None:
        now = time.monotonic()
        if self._stop_asked_at is None:
            self._stop_asked_at = now
            process.ask_to_stop(for_good=self._record.cancel_requested)
        elif now - self._stop_asked_at > self._s._stop_grace_s:
            log.warning("run %s did not stop in %.0f s: killed", self._record.run_id, self._s._stop_grace_s)
            process.kill()

    def _conclude(self, ending: str) -> JobRecord:
        status = self._status()
        message = "" if status is None else str(status.get("message", ""))
        outcome = "lost" if status is None else status["outcome"]
        log.info("run %s: attempt %d: %s %s", self._record.run_id, self._record.attempt, outcome, message)
        if outcome == "succeeded":
            assert status is not None
            return self._publish(status) if self._record.kind in MODEL_KINDS else self._succeed(status, None)
        if outcome == "failed":
            return self._settle(lambda record: machine.fail(record, message))
        if outcome == "stopped" and self._record.cancel_requested:
            assert status is not None
            progress = self._last_progress(status)
            return self._settle(lambda record: machine.cancel(machine.report(record, progress), message))
        if outcome == "stopped":
            return self._settle(lambda record: machine.requeue(record, "its worker was stopped", counts=False))
        return self._settle(lambda record: machine.requeue(record, f"the training process {ending}", counts=True))

    def _status(self) -> dict[str, Any] | None:
        """Return how the process says that it ended, None where it could not."""
        try:
            status = json.loads((self._run / STATUS_FILE).read_bytes())
        except (OSError, ValueError):
            status = self._ended
        return status if status is not None and status["attempt"] == self._record.attempt else None

    def _publish(self, status: dict[str, Any]) -> JobRecord:
        kind, name = MODEL_KINDS[self._record.kind], self._record.model_name
        checkpoint = self._run / "checkpoints" / status["checkpoint"]
        try:
            version = Registry(self._volume).publish(name, kind, self._record.run_id, checkpoint, status["metrics"])
        except TandemError as error:
            message = f"trained, but not published: {error}"
            return self._settle(lambda record: machine.fail(record, message))
        self._s._patiently(lambda: self._store.announce_model(name, version.version))
        return self._succeed(status, version.version)

    def _succeed(self, status: dict[str, Any], model_version: int | None) -> JobRecord:
        progress = self._last_progress(status)
        return self._settle(lambda record: machine.finish(machine.report(record, progress), model_version))

    def _last_progress(self, status: dict[str, Any]) -> Progress:
        """Return how far the attempt came, with what it was found to be worth at its end."""
        # Progress may not have come through for the last time.
        last = (self._unsent or self._record.progress).model_dump()
        return Progress.model_validate({**last, "metrics": status.get("metrics") or last["metrics"]})

    def _settle(self, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Write the record's next state, waiting for the broker as long as it takes: the end must not be lost.

        A worker that has been told to stop waits a few seconds only: checkpoint and status are on the volume, and the
        reaper of another worker finds the run.
        """
        began = time.monotonic()
        while True:
            try:
                record = self._update(change)
            except BrokerUnavailable as error:
                if self._s._is_draining() and time.monotonic() - began > _DRAIN_PATIENCE_S:
                    raise
                log.warning("the broker is away; the end of run %s waits: %s", self._record.run_id, error)
                time.sleep(1.0)
                continue
            self._s._patiently(partial(mirror, self._volume, record))
            return record


def _append(file: IO[str], event: dict[str, Any]) -> None:
    file.write(json.dumps(event) + "\n")
    file.flush()
