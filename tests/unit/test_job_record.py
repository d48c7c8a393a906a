"""The state machine, by example and over random interleavings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import Conflict
from tandem.jobs import record as machine
from tandem.jobs.record import JobRecord, Progress, State


def queued(**changes: object) -> JobRecord:
    at = machine.now()
    values = {"run_id": "r", "kind": "train_classifier", "dataset": "d", "model_name": "m", "queue": "default"}
    return JobRecord.model_validate({**values, "submitted_at": at, "updated_at": at, **changes})


def test_a_run_goes_from_queued_to_succeeded() -> None:
    record = machine.report(machine.start(queued()), Progress(epoch=1, step=3))
    done = machine.finish(record, model_version=2)
    assert (done.state, done.attempt, done.model_version, done.progress.step) == (State.SUCCEEDED, 1, 2, 3)
    assert done.finished_at is not None


def test_cancel_ends_a_waiting_run_at_once_and_flags_a_running_one() -> None:
    assert machine.request_cancel(queued()).state is State.CANCELED
    running = machine.request_cancel(machine.start(queued()))
    assert (running.state, running.cancel_requested) == (State.RUNNING, True)
    assert machine.cancel(running).state is State.CANCELED


def test_a_cancel_that_meets_a_lost_worker_is_kept() -> None:
    running = machine.request_cancel(machine.start(queued()))
    assert machine.requeue(running, "its worker was lost", counts=True).state is State.CANCELED


def test_attempts_are_capped_and_preemption_is_not_counted() -> None:
    record = queued(max_attempts=2)
    record = machine.requeue(machine.start(record), "drained", counts=False)
    record = machine.requeue(machine.start(record), "lost", counts=True)
    record = machine.requeue(machine.start(record), "lost", counts=True)
    assert (record.state, record.attempt) == (State.FAILED, 3)
    assert "gave up after 3 attempts" in record.message


def test_resume_continues_the_numbering_that_fences() -> None:
    failed = machine.fail(machine.start(queued()), "volume full")
    again = machine.start(machine.resume(failed))
    assert (again.state, again.attempt, again.message) == (State.RUNNING, 2, "")
    with pytest.raises(Conflict, match="is RUNNING"):
        machine.resume(again)


FACTS = {
    "start": machine.start,
    "report": lambda record: machine.report(record, Progress(step=1)),
    "finish": lambda record: machine.finish(record, 1),
    "fail": lambda record: machine.fail(record, "why"),
    "request_cancel": machine.request_cancel,
    "cancel": machine.cancel,
    "lose": lambda record: machine.requeue(record, "lost", counts=True),
    "drain": lambda record: machine.requeue(record, "drained", counts=False),
    "resume": machine.resume,
}


@given(st.lists(st.sampled_from(sorted(FACTS)), max_size=40))
def test_whatever_happens_the_record_stays_sound(facts: list[str]) -> None:
    record = queued(max_attempts=3)
    for fact in facts:
        before = record
        try:
            record = FACTS[fact](record)
        except Conflict:
            # A fact that does not fit changes nothing.
            assert record is before
            continue
        assert record.attempt >= before.attempt
        assert record.attempt <= record.max_attempts
        assert (record.finished_at is not None) == record.state.is_terminal
        if before.state.is_terminal:
            assert fact == "resume"
        if record.state is State.SUCCEEDED:
            assert record.model_version is not None


def test_the_document_is_flat_as_scripts_expect() -> None:
    running = machine.report(machine.start(queued()), Progress(epoch=2, step=7, metrics={"train_loss": 1.5}))
    document = running.document()
    expected = {"run_id": "r", "kind": "train_classifier", "state": "RUNNING", "attempt": 1, "epoch": 2, "step": 7}
    assert expected.items() <= document.items()
    assert document["metrics"] == {"train_loss": 1.5}
