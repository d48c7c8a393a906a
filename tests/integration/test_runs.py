"""Runs through a real broker and real workers: done, canceled, killed, drained, lost and found."""

import fcntl
import json
import os
import signal
import time

import pytest
from factories import classifier_card, classifier_files
from rig import LONG, Bench, processes, weights
from samples import SHAPES
from waiting import wait_for

from services.trainer.holder import computing_process
from tandem.checkpoints.files import (
    list_checkpoints,
    read_verified,
    remove_checkpoints,
    step_directory,
    write_checkpoint,
)
from tandem.checkpoints.protection import pins_in_force
from tandem.checkpoints.registry import Registry
from tandem.errors import BrokerUnavailable, Conflict, InvalidJob, ModelNotFound
from tandem.jobs.queue import make_celery
from tandem.jobs.runs import cancel, list_runs, pause, read_mirror, resume
from tandem.jobs.spec import make_spec
from tandem.jobs.store import JobStore, connect
from tandem.jobs.submit import submit


# Long enough to be interrupted anywhere, short enough to finish in seconds.
def test_both_kinds_of_run_succeed_and_are_published(bench: Bench) -> None:
    bench.start_worker()
    runs = {"shapes": bench.classifier(), "words": bench.language_model()}
    for model, run_id in runs.items():
        record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
        assert record.state == "SUCCEEDED", record.message
        assert (record.attempt, record.model_version) == (1, 1)
        assert record.progress.step == record.progress.num_steps > 0
        version = Registry(bench.volume).resolve(model).version
        assert version is not None
        assert version.run_id == run_id
        directory = bench.volume.run(run_id)
        assert {"job.json", "record.json", "status.json", "log.txt", "events.jsonl"} <= {
            path.name for path in directory.iterdir()
        }
        kinds = {json.loads(line)["type"] for line in (directory / "events.jsonl").read_text().splitlines()}
        assert {"started", "epoch", "checkpoint", "ended"} <= kinds
        assert list((directory / "tensorboard").glob("events.out.tfevents.*"))
    assert "test_ppl" in bench.record(runs["words"]).progress.metrics
    assert "val_acc1" in bench.record(runs["shapes"]).progress.metrics
    assert [record.run_id for record in list_runs(bench.volume, lambda: None)] == sorted(runs.values(), reverse=True)


def test_a_cancel_saves_a_checkpoint_and_the_run_can_be_resumed(bench: Bench) -> None:
    bench.start_worker()
    run_id = bench.language_model(**{**LONG, "checkpoint_every_s": 3600})
    bench.wait_for_step(run_id, 10)
    cancel(run_id, bench.volume, bench.store)
    canceled = bench.wait_for_state(run_id, "CANCELED")
    assert "did not stop in" not in bench.worker_log()
    assert not bench.training_processes(run_id)
    (*_, newest) = list_checkpoints(bench.volume.run(run_id))
    read_verified(newest)
    resume(run_id, bench.volume, bench.store, make_celery(bench.url))
    done = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (done.state, done.attempt) == ("SUCCEEDED", canceled.attempt + 1)


def test_a_publication_that_takes_longer_than_a_lease_stays_with_its_worker(bench: Bench) -> None:
    """As that of a large model, whose files are verified, or one that waits for its turn."""
    for _ in range(2):
        bench.start_worker(TANDEM_LEASE_S="1.5")
    model = bench.volume.model("words")
    model.mkdir(parents=True)
    with open(model / ".lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        run_id = bench.language_model(epochs=1)
        wait_for((bench.volume.run(run_id) / "status.json").exists, "the end of the training")
        time.sleep(4.0)
        assert bench.record(run_id).state == "RUNNING"
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (record.state, record.attempt) == ("SUCCEEDED", 1), record.message


def test_a_waiting_run_is_canceled_at_once(bench: Bench) -> None:
    run_id = bench.classifier()
    assert cancel(run_id, bench.volume, bench.store).state == "CANCELED"
    bench.start_worker()
    other = bench.language_model()
    bench.wait_for_state(other, "SUCCEEDED")
    assert bench.record(run_id).attempt == 0, "the worker dropped the message of the canceled run"


def test_what_a_waiting_run_refers_to_stays_until_it_has_ended(bench: Bench) -> None:
    source = step_directory(bench.volume.run("source"), 1)
    write_checkpoint(source, classifier_files(classifier_card(classes=SHAPES, run_id="source")))

    def pinned_by() -> list[str]:
        return [pin.who for pin in pins_in_force(bench.volume, "source").in_force]

    run_id = bench.submit(kind="evaluate_classifier", dataset="shapes", model="run:source/1")
    assert pinned_by() == [run_id]
    cancel(run_id, bench.volume, bench.store)
    assert pinned_by() == []
    resume(run_id, bench.volume, bench.store, make_celery(bench.url))
    assert pinned_by() == [run_id]
    cancel(run_id, bench.volume, bench.store)
    remove_checkpoints([source])
    with pytest.raises(ModelNotFound, match="run:source/1 has been removed"):
        resume(run_id, bench.volume, bench.store, make_celery(bench.url))
    assert bench.record(run_id).state == "CANCELED"


def test_a_stopped_worker_saves_and_hands_the_run_on(bench: Bench) -> None:
    first = bench.start_worker()
    run_id = bench.language_model(**{**LONG, "checkpoint_every_s": 3600})
    bench.wait_for_step(run_id, 20)
    first.send_signal(signal.SIGTERM)
    first.wait(240)
    drained = bench.record(run_id)
    assert drained.state == "QUEUED"
    assert list_checkpoints(bench.volume.run(run_id))
    bench.start_worker()
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (record.state, record.attempt) == ("SUCCEEDED", 2)
    log = (bench.volume.run(run_id) / "log.txt").read_text()
    assert "resumes at step" in log


def test_a_broker_that_loses_everything_gets_the_runs_back_from_the_volume(bench: Bench) -> None:
    run_id = bench.classifier()
    os.killpg(bench.broker.pid, signal.SIGKILL)
    bench.broker.wait()
    for path in (bench.volume.home / "appendonlydir").iterdir():
        path.unlink()
    bench.start_broker()
    wait_for(lambda: _has_forgotten(bench, run_id), "an empty broker")
    bench.start_worker()
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert record.state == "SUCCEEDED", record.message


def test_a_broker_that_loses_everything_in_the_middle_of_a_run_costs_nothing(bench: Bench) -> None:
    bench.start_worker()
    running = bench.language_model(**LONG)
    waiting = bench.language_model(model_name="later")
    bench.wait_for_step(running, 20)
    connect(bench.url).flushall()
    for run_id in (running, waiting):
        record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
        assert (record.state, record.attempt) == ("SUCCEEDED", 1), record.message


def test_a_record_that_can_not_be_written_harms_no_run_and_is_written_when_it_can(bench: Bench) -> None:
    bench.start_worker()
    run_id = bench.language_model(**LONG)
    run = bench.volume.run(run_id)
    bench.wait_for_step(run_id, 20)
    # The supervisor can't write it any more, as on a full disk; that must not kill the process that saves.
    (run / "record.json").unlink()
    (run / "record.json").mkdir()
    (run / "record.json" / "in the way").write_text("")
    done = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (done.state, done.attempt) == ("SUCCEEDED", 1)
    (run / "record.json" / "in the way").unlink()
    (run / "record.json").rmdir()
    wait_for(lambda: read_mirror(run) == done, "the record on the volume")


def test_a_name_keeps_its_kind(bench: Bench) -> None:
    bench.start_worker()
    bench.wait_for_state(bench.language_model(model_name="m", epochs=1), "SUCCEEDED")
    with pytest.raises(Conflict, match="'m' is a language model; give the classifier another --name"):
        bench.classifier(model_name="m")


def _has_forgotten(bench: Bench, run_id: str) -> bool:
    try:
        return bench.store.get(run_id) is None
    except BrokerUnavailable:
        return False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": "alexnet", "image_size": 16}, "alexnet can't take 16×16 images"),
        ({"learning_rate": 1e30, "epochs": 3, "warmup_epochs": 0}, "the loss became"),
    ],
)
def test_a_run_that_can_not_work_fails_with_one_line(bench: Bench, values: dict[str, object], message: str) -> None:
    bench.start_worker()
    record = bench.wait_for_state(bench.classifier(**values), "SUCCEEDED", "FAILED")
    assert record.state == "FAILED"
    assert message in record.message
    assert record.attempt == 1, "trying again would not help"


def test_a_full_volume_is_tried_again_and_keeps_the_last_checkpoint(bench: Bench) -> None:
    bench.start_worker()
    run_id = bench.language_model(**LONG)
    run = bench.volume.run(run_id)
    wait_for(lambda: len(list_checkpoints(run)) >= 2, "two checkpoints")
    # Root ignores modes: a file in the place of the directory fails every further save, as a full disk does.
    (run / "checkpoints").rename(run / "kept")
    (run / "checkpoints").write_text("in the way")
    record = bench.wait_for_state(run_id, "QUEUED", "SUCCEEDED", "FAILED")
    assert (record.state, record.error, record.failures) == ("QUEUED", "volume", 1)
    assert "can't write" in record.message
    (run / "checkpoints").unlink()
    (run / "kept").rename(run / "checkpoints")
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (record.state, record.attempt) == ("SUCCEEDED", 2), "nobody had to ask"


def test_a_job_for_a_device_that_no_worker_has_is_refused_at_submit(bench: Bench) -> None:
    bench.start_worker()
    with pytest.raises(InvalidJob, match="no worker takes runs from the queue 'gpu' that this job needs"):
        bench.classifier(device="cuda:7")
    with pytest.raises(InvalidJob, match="'gpu-h300'"):
        bench.classifier(scheduling={"gpu": "h300"})


def test_a_paused_run_gives_its_place_to_another_and_goes_on_when_resumed(bench: Bench) -> None:
    bench.start_worker()
    run_id = bench.language_model(**{**LONG, "checkpoint_every_s": 3600})
    bench.wait_for_step(run_id, 10)
    pause(run_id, bench.volume, bench.store)
    paused = bench.wait_for_state(run_id, "PAUSED")
    assert list_checkpoints(bench.volume.run(run_id))
    other = bench.language_model(model_name="other", epochs=1)
    bench.wait_for_state(other, "SUCCEEDED")
    assert bench.record(run_id).state == "PAUSED"
    resume(run_id, bench.volume, bench.store, make_celery(bench.url))
    done = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (done.state, done.attempt, done.failures) == ("SUCCEEDED", paused.attempt + 1, 0)


def test_a_time_limit_ends_a_run_with_a_checkpoint_and_resume_gives_it_as_long_again(bench: Bench) -> None:
    # The limit counts the start too, and on a busy machine an import takes any time: let it be done before.
    bench.start_worker(TANDEM_PRELOAD="1")
    wait_for(lambda: bench.ready_spares(), "a process that has imported everything")
    values = {**LONG, "epochs": 10_000, "checkpoint_every_s": 3600}
    run_id = bench.language_model(**values, scheduling={"time_limit_s": 8.0})
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (record.state, record.error, record.attempt) == ("FAILED", "time_limit", 1)
    assert "its time limit of 8 s is over; stopped at step" in record.message
    assert 8.0 <= record.spent_s < 60.0
    step = record.saved_step
    read_verified(list_checkpoints(bench.volume.run(run_id))[-1])
    wait_for(lambda: bench.ready_spares(), "another")
    resume(run_id, bench.volume, bench.store, make_celery(bench.url))
    bench.wait_for_step(run_id, step + 1, attempt=2)
    cancel(run_id, bench.volume, bench.store)
    assert bench.wait_for_state(run_id, "CANCELED").saved_step > step


def test_a_waiting_process_computes_a_run_as_a_fresh_one_does(bench: Bench) -> None:
    fresh = bench.language_model(model_name="fresh")
    bench.start_worker()
    bench.wait_for_state(fresh, "SUCCEEDED")
    os.killpg(bench.workers[0].pid, signal.SIGKILL)
    worker = bench.start_worker(TANDEM_PRELOAD="1")
    wait_for(lambda: bench.spares(), "a process that waits")
    (spare,) = bench.spares()
    run_id = bench.language_model(model_name="spared")
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert record.state == "SUCCEEDED", record.message
    computing = computing_process(bench.volume.run(run_id))
    assert computing is not None
    assert computing.pid == spare
    assert weights(bench, run_id) == weights(bench, fresh)
    wait_for(lambda: bench.spares() not in ([], [spare]), "another that waits")
    worker.send_signal(signal.SIGTERM)
    worker.wait(240)
    wait_for(lambda: not bench.spares(), "the end of the one that waited")


def test_submitting_to_a_broker_that_is_down_leaves_nothing_behind(bench: Bench) -> None:
    os.killpg(bench.broker.pid, signal.SIGKILL)
    bench.broker.wait()
    with pytest.raises(BrokerUnavailable, match="does not answer"):
        bench.classifier()
    assert not list(bench.volume.runs.glob("*"))


def test_a_job_for_the_wrong_kind_of_data_is_refused_at_submit(bench: Bench) -> None:
    values = {"kind": "train_classifier", "dataset": "words", "model_name": "m", "arch": "resnet18"}
    store = JobStore(connect(bench.url), bench.url)
    with pytest.raises(InvalidJob, match="'words' is a dataset of text; this job needs images"):
        submit(make_spec(values), bench.volume, store, make_celery(bench.url))


def test_no_worker_process_outlives_its_worker(bench: Bench) -> None:
    worker = bench.start_worker()
    worker.send_signal(signal.SIGTERM)
    worker.wait(240)
    home = str(bench.volume.home)
    wait_for(lambda: not [pid for pid, command in processes() if home in command and "services" in command])
