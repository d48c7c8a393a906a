"""The job record and its state machine: pure functions from a record and a fact to the next record.

    QUEUED ──start──▶ RUNNING ──finish──▶ SUCCEEDED
      ▲ │ ▲             │ │ └────fail───▶ FAILED ──┐
      │ │ └──requeue────┘ └─────cancel──▶ CANCELED ─┤
      │ └─────────cancel────────────────▶ CANCELED ─┤
      └─────────────────resume──────────────────────┘

A record lives in Redis while its run is alive and is mirrored to `runs/<run_id>/record.json`, so that the volume alone
is enough to list the runs. `attempt` counts the tries and fences them: a try writes only while the number is its own.
"""

import secrets
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tandem.errors import Conflict


class State(StrEnum):
    """Where a run stands."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"

    @property
    def is_terminal(self) -> bool:
        """True when nothing more will happen."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELED)


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


class JobRecord(BaseModel):
    """One run's life."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    run_id: str
    kind: str
    dataset: str
    model_name: str
    queue: str
    state: State = State.QUEUED
    attempt: int = 0
    max_attempts: int = 5
    cancel_requested: bool = False
    progress: Progress = Progress()
    message: str = ""
    model_version: int | None = None
    submitted_at: str
    started_at: str | None = None
    finished_at: str | None = None
    updated_at: str

    def document(self) -> dict[str, Any]:
        """Return what `runs show --json` prints: the record with its progress laid flat."""
        values = self.model_dump(mode="json")
        return {**values, **values.pop("progress")}


def now() -> str:
    """Return the UTC time as ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def new_run_id() -> str:
    """Return an id that sorts by time of submission: 20261123-151200-3f9a1c."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def start(record: JobRecord) -> JobRecord:
    """A worker took the run: the next attempt begins."""
    _require(record, State.QUEUED)
    if record.attempt >= record.max_attempts:
        raise Conflict(f"run {record.run_id} has used its {record.max_attempts} attempts")
    changes = {"state": State.RUNNING, "attempt": record.attempt + 1, "message": ""}
    return _with(record, started_at=record.started_at or now(), **changes)


def report(record: JobRecord, progress: Progress) -> JobRecord:
    """The attempt came further."""
    _require(record, State.RUNNING)
    return _with(record, progress=progress)


def finish(record: JobRecord, model_version: int | None) -> JobRecord:
    """The run ended as it should; what it made is version `model_version` in the registry, None if it is no model."""
    _require(record, State.RUNNING)
    return _with(record, state=State.SUCCEEDED, model_version=model_version, finished_at=now(), message="")


def fail(record: JobRecord, message: str) -> JobRecord:
    """The run ended in an error that another attempt would meet again."""
    _require(record, State.RUNNING, State.QUEUED)
    return _with(record, state=State.FAILED, message=message, finished_at=now())


def request_cancel(record: JobRecord) -> JobRecord:
    """Someone asked for an end: at once where the run waits, else the supervisor sees the flag."""
    _require(record, State.QUEUED, State.RUNNING)
    if record.state is State.QUEUED:
        return _with(record, state=State.CANCELED, cancel_requested=True, finished_at=now())
    return _with(record, cancel_requested=True)


def cancel(record: JobRecord, message: str = "") -> JobRecord:
    """The attempt has stopped and saved, as asked."""
    _require(record, State.RUNNING)
    return _with(record, state=State.CANCELED, message=message, finished_at=now())


def resume(record: JobRecord) -> JobRecord:
    """Someone asked a failed or canceled run to go on: it gets as many attempts again as it was given first."""
    _require(record, State.FAILED, State.CANCELED)
    default = JobRecord.model_fields["max_attempts"].default
    changes = {"state": State.QUEUED, "max_attempts": record.attempt + default, "cancel_requested": False}
    return _with(record, finished_at=None, message="", **changes)


def requeue(record: JobRecord, message: str, counts: bool) -> JobRecord:
    """The attempt ended through no fault of the run: back to the queue, or FAILED when the attempts are used up.

    `counts=False` gives the attempt back (a drain is nobody's failure) by raising the cap, not by lowering the number:
    the number fences, so it never goes back.
    """
    _require(record, State.RUNNING)
    if record.cancel_requested:
        return cancel(record, message)
    allowed = record.max_attempts + (0 if counts else 1)
    if record.attempt >= allowed:
        return fail(record, f"{message} (gave up after {record.attempt} attempts)")
    return _with(record, state=State.QUEUED, message=message, max_attempts=allowed)


def _require(record: JobRecord, *states: State) -> None:
    if record.state not in states:
        raise Conflict(f"run {record.run_id} is {record.state}")


def _with(record: JobRecord, **changes: Any) -> JobRecord:
    return record.model_copy(update={**changes, "updated_at": now()})
