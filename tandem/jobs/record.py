"""The job record and its state machine: pure functions from a record and a fact to the next record.

    WAITING ──release──▶ QUEUED ──start──▶ RUNNING ──finish──▶ SUCCEEDED
       │                 ▲ │  ▲               │ │ └────fail───▶ FAILED ──┐
       │                 │ │  └────requeue────┤ └─────cancel──▶ CANCELED ─┤
       │                 │ └──pause──▶ PAUSED◀┘                           │
       │                 └─────────────resume─┴───────────────────────────┘
       └──cancel (also of QUEUED and PAUSED)──▶ CANCELED

A record lives in Redis while its run is alive and is mirrored to `runs/<run_id>/record.json`, so that the volume alone
is enough to list the runs. `attempt` counts the tries and fences them: a try writes only while the number is its own.
`revision` counts the changes: of two copies, the one with the higher number is the newer.
"""

import secrets
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tandem.errors import Conflict
from tandem.jobs.failures import Failure, backoff_s

# Celery's numbers on Redis: the lowest goes first.
PRIORITIES = {"urgent": 0, "high": 3, "normal": 6, "low": 9}
Priority = Literal["urgent", "high", "normal", "low"]


class State(StrEnum):
    """Where a run stands."""

    WAITING = "WAITING"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"

    @property
    def is_terminal(self) -> bool:
        """True when the run has ended."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELED)

    @property
    def is_settled(self) -> bool:
        """True when nothing more will happen unless somebody asks for it."""
        return self.is_terminal or self is State.PAUSED


LIVE_STATES = tuple(state for state in State if not state.is_terminal)


class Progress(BaseModel):
    """How far a run is: `epoch` counts from 1; `rate` is in images or words a second; `time_left_s` in seconds."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    epoch: int = 0
    num_epochs: int = 0
    step: int = 0
    num_steps: int = 0
    rate: float | None = None
    time_left_s: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)

    @property
    def percent(self) -> float | None:
        """Return how much of the work is done, 0 to 100; None until that is known."""
        return round(100 * self.step / self.num_steps, 1) if self.num_steps else None


class JobRecord(BaseModel):
    """One run's life.

    - `failures` in a row, of `max_failures`, without a checkpoint beyond `first_step`, where the attempt began.
    - `delayed`: QUEUED, but not to be woken before its backoff is over.
    - `after`: runs that must have SUCCEEDED before this one is queued.
    - `sweep`: the id of the sweep it is part of, of which `max_parallel` may be queued or running at a time; `varied`
      are the values that set it apart.
    - `spent_s`: seconds of computing, of all attempts, that count against `time_limit_s`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    run_id: str
    kind: str
    dataset: str
    model_name: str
    queue: str
    priority: Priority = "normal"
    state: State = State.QUEUED
    revision: int = 0
    attempt: int = 0
    failures: int = 0
    max_failures: int = Field(5, ge=1)
    delayed: bool = False
    stop_requested: Literal["", "cancel", "pause"] = ""
    progress: Progress = Progress()
    first_step: int = 0
    saved_step: int = 0
    spent_s: float = 0.0
    time_limit_s: float | None = None
    message: str = ""
    error: Failure | None = None
    model_version: int | None = None
    key: str | None = None
    webhook: str | None = None
    after: tuple[str, ...] = ()
    sweep: str | None = None
    max_parallel: int | None = None
    varied: dict[str, Any] = Field(default_factory=dict)
    submitted_at: str
    started_at: str | None = None
    finished_at: str | None = None
    updated_at: str

    def document(self) -> dict[str, Any]:
        """Return what `runs show --json` prints: the record with its progress laid flat."""
        values = self.model_dump(mode="json")
        return {**values, **values.pop("progress"), "percent": self.progress.percent}


def now() -> str:
    """Return the UTC time as ISO 8601, to the millisecond. For people: no decision depends on a host's clock."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_run_id() -> str:
    """Return an id that sorts by time of submission: 20261123-151200-3f9a1c07."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def release(record: JobRecord) -> JobRecord:
    """What the run waited for has come: the runs before it, a place in its sweep, or the end of its backoff."""
    if record.state is State.QUEUED and record.delayed:
        return _with(record, delayed=False)
    _require(record, State.WAITING)
    return _with(record, state=State.QUEUED, message="")


def start(record: JobRecord, fence: int = 0) -> JobRecord:
    """A worker took the run: the next attempt begins, with a number above `fence`, which the volume has seen."""
    _require(record, State.QUEUED)
    if record.delayed:
        raise Conflict(f"run {record.run_id} waits before its next attempt")
    changes = {"state": State.RUNNING, "attempt": max(record.attempt, fence) + 1, "message": "", "error": None}
    return _with(record, started_at=record.started_at or now(), first_step=record.saved_step, **changes)


def report(record: JobRecord, progress: Progress, spent_s: float | None = None) -> JobRecord:
    """The attempt came further; all attempts together have computed for `spent_s` seconds."""
    _require(record, State.RUNNING)
    return _with(record, progress=progress, spent_s=record.spent_s if spent_s is None else spent_s)


def saved(record: JobRecord, step: int) -> JobRecord:
    """A checkpoint of `step` is on the volume."""
    _require(record, State.RUNNING)
    return _with(record, saved_step=max(step, record.saved_step))


def finish(record: JobRecord, model_version: int | None, message: str = "") -> JobRecord:
    """The run ended as it should; what it made is version `model_version` in the registry, None if it is no model.

    `message` is what it found, where a sentence says it.
    """
    _require(record, State.RUNNING)
    changes: dict[str, Any] = {"model_version": model_version, "message": message, "stop_requested": ""}
    return _with(record, state=State.SUCCEEDED, finished_at=now(), **changes)


def fail(record: JobRecord, message: str, error: Failure = Failure.INTERNAL) -> JobRecord:
    """The run ended in an error that another attempt would meet again."""
    _require(record, State.RUNNING, State.QUEUED)
    changes: dict[str, Any] = {"message": message, "error": error, "delayed": False, "stop_requested": ""}
    return _with(record, state=State.FAILED, finished_at=now(), **changes)


def request_cancel(record: JobRecord) -> JobRecord:
    """Someone asked for an end: at once where nothing runs, else the supervisor sees the wish."""
    if record.state is State.CANCELED:
        return record
    _require(record, *LIVE_STATES)
    if record.state is State.RUNNING:
        return _with(record, stop_requested="cancel")
    return _with(record, state=State.CANCELED, finished_at=now(), delayed=False)


def request_pause(record: JobRecord) -> JobRecord:
    """Someone asked the run to give its place back; a wish to cancel goes before."""
    if record.state is State.PAUSED:
        return record
    _require(record, State.WAITING, State.QUEUED, State.RUNNING)
    if record.state is State.RUNNING:
        return record if record.stop_requested == "cancel" else _with(record, stop_requested="pause")
    return _with(record, state=State.PAUSED, delayed=False)


def stopped(record: JobRecord, message: str = "") -> JobRecord:
    """The attempt has saved and ended, as asked: CANCELED or PAUSED."""
    _require(record, State.RUNNING)
    if record.stop_requested == "pause":
        return _with(record, state=State.PAUSED, stop_requested="", message=message)
    return cancel(record, message)


def cancel(record: JobRecord, message: str = "") -> JobRecord:
    """The run has ended before its time."""
    _require(record, State.RUNNING, State.WAITING)
    return _with(record, state=State.CANCELED, message=message, finished_at=now(), stop_requested="")


def resume(record: JobRecord) -> JobRecord:
    """Someone asked a run to go on: it gets as many tries, and as much time, as it was given first.

    It waits once more where it is part of a chain or a sweep.
    """
    _require(record, State.FAILED, State.CANCELED, State.PAUSED)
    state = State.WAITING if record.after or record.sweep else State.QUEUED
    spent_s = record.spent_s if record.state is State.PAUSED else 0.0
    changes = {"state": state, "failures": 0, "spent_s": spent_s, "stop_requested": "", "message": "", "error": None}
    return _with(record, finished_at=None, **changes)


def requeue(record: JobRecord, message: str, failure: Failure) -> JobRecord:
    """The attempt ended through no fault of the run: back to the queue, or FAILED after too many in a row.

    Tries without a new checkpoint are counted: a run that gets on, however often it is interrupted, is worth another.
    """
    _require(record, State.RUNNING)
    if record.stop_requested:
        return stopped(record, message)
    before = 0 if record.saved_step > record.first_step else record.failures
    failures = before + failure.is_counted
    if failures >= record.max_failures:
        return fail(record, f"{message} (gave up after {failures} failures in a row)", failure)
    delayed = backoff_s(failure, failures) > 0
    return _with(record, state=State.QUEUED, message=message, error=failure, failures=failures, delayed=delayed)


def _require(record: JobRecord, *states: State) -> None:
    if record.state not in states:
        raise Conflict(f"run {record.run_id} is {record.state}")


def _with(record: JobRecord, **changes: Any) -> JobRecord:
    return record.model_copy(update={**changes, "revision": record.revision + 1, "updated_at": now()})
