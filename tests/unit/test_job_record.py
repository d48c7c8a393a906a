"""The state machine, by example and over random interleavings."""

import pytest
from factories import queued_record
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import Conflict
from tandem.jobs import record as machine
from tandem.jobs.failures import Failure, backoff_s, failure_of
from tandem.jobs.record import JobRecord, Progress, State


def lose(record: JobRecord, failure: Failure = Failure.WORKER_LOST) -> JobRecord:
    after = machine.requeue(record, "lost", failure)
    return machine.release(after) if after.delayed else after


def test_a_run_goes_from_queued_to_succeeded() -> None:
    record = machine.report(machine.start(queued_record()), Progress(epoch=1, step=3))
    done = machine.finish(record, model_version=2)
    assert (done.state, done.attempt, done.model_version, done.progress.step) == (State.SUCCEEDED, 1, 2, 3)
    assert done.finished_at is not None


@pytest.mark.parametrize("state", [State.WAITING, State.QUEUED, State.PAUSED])
def test_cancel_ends_at_once_what_does_not_run(state: State) -> None:
    canceled = machine.request_cancel(queued_record(state=state))
    assert canceled.state is State.CANCELED
    assert machine.request_cancel(canceled) is canceled, "twice is once"


def test_cancel_of_a_running_run_is_a_wish_until_it_has_saved() -> None:
    running = machine.request_cancel(machine.start(queued_record()))
    assert (running.state, running.stop_requested) == (State.RUNNING, "cancel")
    assert machine.stopped(running).state is State.CANCELED


def test_pause_gives_the_place_back_and_resume_takes_it_up_again() -> None:
    assert machine.request_pause(queued_record()).state is State.PAUSED
    wish = machine.request_pause(
        machine.report(machine.start(queued_record(failures=2)), Progress(step=1), spent_s=7.0)
    )
    assert (wish.state, wish.stop_requested) == (State.RUNNING, "pause")
    paused = machine.stopped(wish)
    assert (paused.state, paused.stop_requested, paused.finished_at) == (State.PAUSED, "", None)
    again = machine.resume(paused)
    assert (again.state, again.spent_s, again.failures) == (State.QUEUED, 7.0, 0)


def test_a_cancel_goes_before_a_pause() -> None:
    running = machine.request_cancel(machine.request_pause(machine.start(queued_record())))
    assert machine.request_pause(running) is running
    assert machine.stopped(running).state is State.CANCELED


def test_a_wish_that_meets_a_lost_worker_is_kept() -> None:
    for ask, state in ((machine.request_cancel, State.CANCELED), (machine.request_pause, State.PAUSED)):
        assert machine.requeue(ask(machine.start(queued_record())), "lost", Failure.WORKER_LOST).state is state


def test_failures_are_capped_and_preemption_is_not_counted() -> None:
    record = queued_record(max_failures=2)
    for failure in (Failure.PREEMPTED, Failure.WORKER_LOST, Failure.PREEMPTED, Failure.VOLUME):
        record = lose(machine.start(record), failure)
    assert (record.state, record.attempt, record.error) == (State.FAILED, 4, Failure.VOLUME)
    assert "gave up after 2 failures in a row" in record.message


def test_a_run_that_gets_on_is_given_new_tries() -> None:
    record = queued_record(max_failures=2)
    for step in (5, 10, 15, 20):
        record = lose(machine.saved(machine.start(record), step))
        assert (record.state, record.failures) == (State.QUEUED, 1)
    record = lose(machine.start(record))
    assert record.state is State.FAILED, "the second in a row without a new checkpoint"


def test_retries_wait_longer_each_time_and_a_lost_worker_is_replaced_at_once() -> None:
    assert [backoff_s(Failure.WORKER_LOST, count) for count in (1, 2, 3, 4)] == [0, 1, 2, 4]
    assert [backoff_s(Failure.VOLUME, count) for count in (1, 2, 3)] == [5, 10, 20]
    assert backoff_s(Failure.PROCESS_LOST, 50) == backoff_s(Failure.VOLUME, 50) == 300
    waits = machine.requeue(machine.start(queued_record()), "full", Failure.VOLUME)
    assert waits.delayed
    with pytest.raises(Conflict, match="waits before its next attempt"):
        machine.start(waits)
    assert machine.start(machine.release(waits)).attempt == 2


@pytest.mark.parametrize(
    ("error", "failure", "is_retried"),
    [
        ("InvalidJob", Failure.BAD_SPEC, False),
        ("BadSource", Failure.BAD_DATA, False),
        ("OutOfMemory", Failure.OUT_OF_MEMORY, False),
        ("NonFiniteLoss", Failure.NON_FINITE, False),
        ("VolumeUnavailable", Failure.VOLUME, True),
        ("VolumeReadOnly", Failure.VOLUME, True),
        ("Internal", Failure.INTERNAL, False),
        ("", Failure.INTERNAL, False),
    ],
)
def test_errors_are_classed(error: str, failure: Failure, is_retried: bool) -> None:
    assert failure_of(error) is failure
    assert failure.is_retried is is_retried


def test_resume_continues_the_numbering_that_fences() -> None:
    failed = machine.fail(machine.start(queued_record()), "loss", Failure.NON_FINITE)
    again = machine.start(machine.resume(failed))
    assert (again.state, again.attempt, again.message, again.error) == (State.RUNNING, 2, "", None)
    with pytest.raises(Conflict, match="is RUNNING"):
        machine.resume(again)


def test_an_attempt_is_above_what_the_volume_has_seen() -> None:
    assert machine.start(queued_record(attempt=2), fence=5).attempt == 6
    assert machine.start(queued_record(attempt=7), fence=5).attempt == 8


def test_a_link_of_a_chain_waits_again_when_it_is_resumed() -> None:
    waiting = queued_record(state=State.WAITING, after=("first",))
    assert machine.release(waiting).state is State.QUEUED
    assert machine.resume(machine.cancel(waiting, "first FAILED")).state is State.WAITING


FACTS = {
    "start": machine.start,
    "report": lambda record: machine.report(record, Progress(step=1)),
    "save": lambda record: machine.saved(record, record.saved_step + 1),
    "finish": lambda record: machine.finish(record, 1),
    "fail": lambda record: machine.fail(record, "why"),
    "request_cancel": machine.request_cancel,
    "request_pause": machine.request_pause,
    "stopped": machine.stopped,
    "lose": lambda record: machine.requeue(record, "lost", Failure.WORKER_LOST),
    "fill the volume": lambda record: machine.requeue(record, "full", Failure.VOLUME),
    "drain": lambda record: machine.requeue(record, "drained", Failure.PREEMPTED),
    "release": machine.release,
    "resume": machine.resume,
}


@given(st.lists(st.sampled_from(sorted(FACTS)), max_size=60), st.booleans())
def test_whatever_happens_the_record_stays_sound(facts: list[str], is_link: bool) -> None:
    record = queued_record(max_failures=3, state="WAITING" if is_link else "QUEUED", after=("r0",) if is_link else ())
    for fact in facts:
        before = record
        try:
            record = FACTS[fact](record)
        except Conflict:
            # A fact that does not fit changes nothing.
            assert record is before
            continue
        assert record.attempt - before.attempt == (1 if fact == "start" else 0)
        assert record.revision == before.revision + (record is not before)
        assert record.failures <= record.max_failures
        assert (record.finished_at is not None) == record.state.is_terminal
        assert not record.delayed or record.state is State.QUEUED
        assert not record.stop_requested or record.state in (State.RUNNING, State.CANCELED)
        if before.state.is_terminal and record is not before:
            assert fact == "resume"
        if record.state is State.SUCCEEDED:
            assert record.model_version is not None


def test_the_document_is_flat_as_scripts_expect() -> None:
    progress = Progress(epoch=2, step=7, num_steps=28, metrics={"train_loss": 1.5})
    document = machine.report(machine.start(queued_record()), progress).document()
    expected = {"run_id": "r", "kind": "train_classifier", "state": "RUNNING", "attempt": 1, "epoch": 2, "step": 7}
    assert expected.items() <= document.items()
    assert document["metrics"] == {"train_loss": 1.5}
    assert document["percent"] == 25.0
