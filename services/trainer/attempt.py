"""One try at a run, from the start of its process to its record's next state."""

import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from services.trainer.holder import note_process
from services.trainer.process import TrainingProcess
from services.trainer.reporter_files import STATUS_FILE
from tandem.checkpoints.registry import Registry
from tandem.errors import BrokerUnavailable, RunNotFound, Superseded, TandemError
from tandem.jobs import record as machine
from tandem.jobs.failures import Failure, failure_of
from tandem.jobs.fence import Fence
from tandem.jobs.record import JobRecord, Progress, State
from tandem.jobs.runs import MODEL_KINDS, mirror
from tandem.logs import run_logger

if TYPE_CHECKING:
    from services.trainer.supervisor import Supervisor

log = logging.getLogger(__name__)

_TICK_S = 0.25
# How often a holder renews in the time of a lease.
RENEWALS = 5
_DRAIN_PATIENCE_S = 5.0
_ASK_AGAIN_S = 1.0


class Attempt:
    """The attempt that `record` says has begun, under the lease with this token."""

    def __init__(self, supervisor: "Supervisor", record: JobRecord, token: str) -> None:
        self._s = supervisor
        self._store = supervisor.store
        self._record = record
        self._token = token
        self._log = run_logger(log, record.run_id)
        self._run: Path = supervisor.volume.run(record.run_id)
        self._began = time.monotonic()
        self._spent_before_s = record.spent_s
        self._renewed_at = 0.0
        self._asked: dict[bool, float] = {}
        self._asked_at = -_ASK_AGAIN_S
        self._wish: Literal["", "cancel", "pause"] = ""
        self._ended: dict[str, Any] | None = None
        self._unsent: Progress | None = None
        self._saved_step = record.saved_step
        self._fence = Fence(self._run)
        # Where packets vanish each command waits for seconds, and events come faster: only the renewal is tried then.
        self._is_cut_off = False
        self._uploads = supervisor.stored.uploads(self._run, record.attempt)

    def carry(self) -> JobRecord:
        """Run the process to its end; return the record in its next state. Raises Conflict if the lease is lost."""
        self._log.info("run %s: attempt %d begins", self._record.run_id, self._record.attempt)
        (self._run / STATUS_FILE).unlink(missing_ok=True)
        with self._uploads or nullcontext():
            return self._compute()

    def _compute(self) -> JobRecord:
        process = self._s.spare.start(self._run, self._record.attempt)
        try:
            self._s.patiently(lambda: note_process(self._run, process.pid))
            with open(self._run / "events.jsonl", "a", encoding="utf-8") as events:
                while not process.has_ended():
                    told = process.events(_TICK_S)
                    # Before they are written: after a long sleep another attempt may have begun.
                    self._tick(process)
                    for event in told:
                        if self._is_cut_off:
                            self._fence.check(self._record.attempt)
                        self._s.patiently(partial(_append, events, {**event, "attempt": self._record.attempt}))
                        self._take(event)
        finally:
            # Whatever happened, nothing of this attempt computes on.
            process.kill()
        self._s.patiently(self._send_progress)
        return self._conclude(process.ending())

    def _take(self, event: dict[str, Any]) -> None:
        if not self._is_cut_off:
            self._is_cut_off = not self._s.patiently(lambda: self._store.add_event(self._record.run_id, event))
        if event["type"] == "progress":
            self._unsent = Progress.model_validate(event)
            if self._unsent.rate is not None:
                self._s.meter.progressed(self._record.kind, self._unsent.rate)
        elif event["type"] == "checkpoint":
            self._saved_step = int(event["step"])
            if self._uploads is not None:
                self._uploads.look()
            self._s.meter.saved(event["seconds"], event["num_bytes"])
        elif event["type"] == "ended":
            self._ended = event

    def _tick(self, process: TrainingProcess) -> None:
        self._s.alive_at = time.monotonic()
        if self._uploads is not None:
            self._uploads.check()
        self._is_cut_off = not self._s.patiently(self._renew)
        if not self._is_cut_off:
            self._s.patiently(self._send_progress)
        if self._record.stop_requested == "cancel" or self._is_out_of_time():
            self._stop(process, for_good=True)
        elif self._record.stop_requested or self._s.is_draining():
            self._stop(process, for_good=False)

    def _is_out_of_time(self) -> bool:
        limit_s = self._record.time_limit_s
        return limit_s is not None and self._spent_s() >= limit_s

    def _spent_s(self) -> float:
        return round(self._spent_before_s + time.monotonic() - self._began, 3)

    def _renew(self) -> None:
        now = time.monotonic()
        if now - self._renewed_at < self._s.patience.lease_s / RENEWALS:
            return
        try:
            self._s.renew(self._record.run_id, self._token)
        except BrokerUnavailable:
            # A host that is cut off learns from the volume that another attempt has begun.
            self._fence.check(self._record.attempt)
            raise
        self._renewed_at = now

    def _send_progress(self) -> None:
        """Bring record and mirror up to date; this also reads whether an end was asked for."""
        if self._unsent is None and self._saved_step == self._record.saved_step:
            current = self._store.get(self._record.run_id)
            if current is not None and current.attempt == self._record.attempt:
                if current.state is not State.RUNNING:
                    raise Superseded(f"run {current.run_id} is {current.state}; its attempt {current.attempt} is over")
                self._record = current
                self._wish = self._wish or current.stop_requested
            return
        self._record = self._update(self._with_news)
        self._unsent = None
        mirror(self._s.volume, self._record, durable=False)

    def _with_news(self, record: JobRecord) -> JobRecord:
        if self._wish and not record.stop_requested:
            # A broker that was killed may have forgotten it.
            record = machine.request_pause(record) if self._wish == "pause" else machine.request_cancel(record)
        self._wish = record.stop_requested
        record = machine.saved(record, self._saved_step) if self._saved_step > record.saved_step else record
        return machine.report(record, self._unsent or record.progress, self._spent_s())

    def _update(self, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        try:
            return self._store.update(self._record.run_id, change, attempt=self._record.attempt)
        except RunNotFound:
            # The broker has lost its data; this process knows the run.
            self._store.create(self._record)
        except Superseded:
            # Killed, it may come back a second older, from before this attempt began.
            current = self._store.get(self._record.run_id)
            if current is None or current.attempt >= self._record.attempt:
                raise
            self._store.put_newer(self._record)
        return self._store.update(self._record.run_id, change, attempt=self._record.attempt)

    def _stop(self, process: TrainingProcess, for_good: bool) -> None:
        now = time.monotonic()
        began = self._asked.setdefault(for_good, now)
        # Again each second: between its start and its first lines a process hears nothing.
        if (began == now or process.is_one) and now - self._asked_at >= _ASK_AGAIN_S:
            self._asked_at = now
            process.ask_to_stop(for_good)
        if now - self._asked[for_good] > self._s.patience.stop_grace_s:
            grace_s = self._s.patience.stop_grace_s
            self._log.warning("run %s did not stop in %.0f s: killed", self._record.run_id, grace_s)
            process.kill()

    def _conclude(self, ending: str) -> JobRecord:
        status = self._status()
        if status is None:
            self._log.info("run %s: attempt %d: lost: %s", self._record.run_id, self._record.attempt, ending)
            return self._lost(ending)
        outcome, message = status["outcome"], str(status.get("message", ""))
        self._log.info("run %s: attempt %d: %s %s", self._record.run_id, self._record.attempt, outcome, message)
        if outcome in ("succeeded", "stopped") and not self._is_stored():
            return self._requeue("its worker was stopped before the object store had its checkpoint", Failure.PREEMPTED)
        if outcome == "succeeded":
            return self._publish(status) if self._record.kind in MODEL_KINDS else self._succeed(status, None, message)
        if outcome == "failed":
            return self._failed(message, failure_of(str(status.get("error", ""))))
        if outcome == "stopped":
            return self._stopped(status, message)
        if outcome == "superseded":
            raise Superseded(message)
        return self._lost(ending)

    def _is_stored(self) -> bool:
        """Wait until the store has what the attempt has saved; False if the worker is told to stop before.

        The end of a run must not be lost, so it waits for the store as long as that takes. A worker that drains waits
        as long as for a process that saves; where somebody wants the run ended, what is on the volume is enough.
        """
        if self._uploads is None:
            return True
        deadline = time.monotonic() + self._s.patience.stop_grace_s

        def may_wait() -> bool:
            self._s.alive_at = time.monotonic()
            self._s.patiently(self._send_progress)
            is_urgent = self._s.is_draining() or bool(self._record.stop_requested) or self._is_out_of_time()
            return not is_urgent or time.monotonic() < deadline

        return self._uploads.finish(may_wait) or not self._s.is_draining()

    def _lost(self, ending: str) -> JobRecord:
        """Settle an attempt that said nothing: it may have been asked to stop before it could answer."""
        if self._asked and self._is_out_of_time():
            return self._stopped({}, "stopped before it could save")
        if self._asked and self._s.is_draining():
            return self._requeue("its worker was stopped", Failure.PREEMPTED)
        return self._requeue(f"the training process {ending}", Failure.PROCESS_LOST)

    def _failed(self, message: str, failure: Failure) -> JobRecord:
        if failure.is_retried:
            return self._requeue(message, failure)
        return self._settle(lambda record: machine.fail(record, message, failure))

    def _requeue(self, message: str, failure: Failure) -> JobRecord:
        return self._settle(lambda record: machine.requeue(record, message, failure))

    def _stopped(self, status: dict[str, Any], message: str) -> JobRecord:
        progress, out_of_time = self._last_progress(status), self._is_out_of_time()

        def change(record: JobRecord) -> JobRecord:
            record = machine.report(record, progress, self._spent_s())
            if record.stop_requested:
                return machine.stopped(record, message)
            if out_of_time:
                over = f"its time limit of {record.time_limit_s:g} s is over; {message}; 'tandem runs resume' goes on"
                return machine.fail(record, over, Failure.TIME_LIMIT)
            return machine.requeue(record, "its worker was stopped", Failure.PREEMPTED)

        return self._settle(change)

    def _status(self) -> dict[str, Any] | None:
        """Return how the process says that it ended, None where it could not."""
        try:
            status = json.loads((self._run / STATUS_FILE).read_bytes())
        except (OSError, ValueError):
            status = self._ended
        if status is None or status["attempt"] != self._record.attempt:
            status = self._ended
        return status if status is not None and status["attempt"] == self._record.attempt else None

    def _publish(self, status: dict[str, Any]) -> JobRecord:
        kind, name = MODEL_KINDS[self._record.kind], self._record.model_name
        checkpoint = self._run / "checkpoints" / status["checkpoint"]
        try:
            with self._fence.held(self._record.attempt):
                version = Registry(self._s.volume).publish(
                    name, kind, self._record.run_id, checkpoint, status["metrics"]
                )
        except Superseded:
            raise
        except TandemError as error:
            failure = failure_of(type(error).__name__)
            return self._failed(f"trained, but not published: {error}", failure)
        self._s.patiently(lambda: self._store.announce_model(name, version.version))
        return self._succeed(status, version.version)

    def _succeed(self, status: dict[str, Any], model_version: int | None, message: str = "") -> JobRecord:
        progress = self._last_progress(status)
        return self._settle(
            lambda record: machine.finish(machine.report(record, progress, self._spent_s()), model_version, message)
        )

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
                record = self._update(lambda current: change(self._with_news(current)))
            except BrokerUnavailable as error:
                if self._s.is_draining() and time.monotonic() - began > _DRAIN_PATIENCE_S:
                    raise
                self._log.warning("the broker is away; the end of run %s waits: %s", self._record.run_id, error)
                time.sleep(1.0)
                continue
            return record


def _append(file: IO[str], event: dict[str, Any]) -> None:
    file.write(json.dumps(event) + "\n")
    file.flush()
