"""Runs through a real broker and real workers: done, canceled, killed, drained, lost and found."""

import json
import os
import signal
import time

import pytest
from rig import LEASE_S, Bench, processes, wait_for

from tandem.checkpoints.files import WEIGHTS_FILE, list_checkpoints, read_pointer, read_verified
from tandem.checkpoints.registry import Registry
from tandem.errors import BrokerUnavailable, Conflict, InvalidJob
from tandem.jobs.queue import make_celery, priority_keys
from tandem.jobs.runs import cancel, list_runs, resume, submit
from tandem.jobs.spec import make_spec
from tandem.jobs.store import JobStore, connect

# Long enough to be interrupted anywhere, short enough to finish in seconds.
LONG = {"epochs": 40, "checkpoint_every_s": 0.2}


def weights(bench: Bench, run_id: str) -> bytes:
    checkpoint = read_pointer(bench.volume.run(run_id), "latest")
    assert checkpoint is not None
    return read_verified(checkpoint, (WEIGHTS_FILE,))[WEIGHTS_FILE]


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
    asked = time.monotonic()
    canceled = bench.wait_for_state(run_id, "CANCELED")
    assert time.monotonic() - asked < 20.0
    assert not bench.training_processes(run_id)
    (*_, newest) = list_checkpoints(bench.volume.run(run_id))
    read_verified(newest)
    resume(run_id, bench.volume, bench.store, make_celery(bench.url))
    done = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (done.state, done.attempt) == ("SUCCEEDED", canceled.attempt + 1)


def test_a_waiting_run_is_canceled_at_once(bench: Bench) -> None:
    run_id = bench.classifier()
    assert cancel(run_id, bench.volume, bench.store).state == "CANCELED"
    bench.start_worker()
    other = bench.language_model()
    bench.wait_for_state(other, "SUCCEEDED")
    assert bench.record(run_id).attempt == 0, "the worker dropped the message of the canceled run"


def test_a_killed_training_process_is_tried_again_and_ends_in_the_same_bytes(bench: Bench) -> None:
    bench.start_worker()
    undisturbed = bench.language_model(**LONG, model_name="undisturbed")
    bench.wait_for_state(undisturbed, "SUCCEEDED")
    run_id = bench.language_model(**LONG)
    bench.wait_for_step(run_id, 20)
    (pid,) = bench.training_processes(run_id)
    os.kill(pid, signal.SIGKILL)
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (record.state, record.attempt) == ("SUCCEEDED", 2)
    assert weights(bench, run_id) == weights(bench, undisturbed)


def test_a_killed_worker_takes_its_processes_along_and_another_finishes_the_run(bench: Bench) -> None:
    first = bench.start_worker()
    run_id = bench.language_model(**LONG)
    bench.wait_for_step(run_id, 20)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    wait_for(lambda: not bench.training_processes(run_id), 10.0, "the end of the orphan")
    bench.start_worker()
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED", timeout_s=60)
    assert record.state == "SUCCEEDED", record.message
    assert record.attempt == 2
    assert [version.run_id for version in Registry(bench.volume).versions("words")] == [run_id]


def test_a_stopped_worker_saves_and_hands_the_run_on(bench: Bench) -> None:
    first = bench.start_worker()
    run_id = bench.language_model(**{**LONG, "checkpoint_every_s": 3600})
    bench.wait_for_step(run_id, 20)
    first.send_signal(signal.SIGTERM)
    first.wait(30)
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
    wait_for(lambda: _has_forgotten(bench, run_id), 10.0, "an empty broker")
    bench.start_worker()
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED", timeout_s=60)
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


def test_a_record_that_can_not_be_written_fails_the_run_once_and_says_so(bench: Bench) -> None:
    bench.start_worker()
    run_id = bench.language_model(**LONG)
    run = bench.volume.run(run_id)
    bench.wait_for_step(run_id, 20)
    # The supervisor can't write it any more, as on a full disk; that must not kill the process that saves.
    (run / "record.json").unlink()
    (run / "record.json").mkdir()
    (run / "record.json" / "in the way").write_text("")
    wait_for(lambda: (bench.store.get(run_id) or bench.record(run_id)).state.is_terminal, 90.0, "the end")
    record = bench.store.get(run_id)
    assert record is not None
    assert (record.state, record.attempt) == ("FAILED", 1)
    assert "can't write" in record.message
    assert "record.json" in record.message
    assert list_checkpoints(run)


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


def test_a_broker_killed_in_the_middle_of_a_run_costs_nothing(bench: Bench) -> None:
    bench.start_worker()
    run_id = bench.language_model(**LONG)
    bench.wait_for_step(run_id, 10)
    os.killpg(bench.broker.pid, signal.SIGKILL)
    bench.broker.wait()
    time.sleep(1.5 * LEASE_S)
    bench.start_broker()
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (record.state, record.attempt) == ("SUCCEEDED", 1)
    assert len(Registry(bench.volume).versions("words")) == 1


def test_a_message_delivered_twice_runs_once(bench: Bench) -> None:
    from tandem.jobs.queue import send_run

    run_id = bench.language_model()
    send_run(make_celery(bench.url), run_id, "default")
    bench.start_worker()
    bench.start_worker()
    bench.wait_for_state(run_id, "SUCCEEDED")
    wait_for(lambda: bench.store.count_messages(priority_keys("default")) == 0, 20.0, "an empty queue")
    assert bench.record(run_id).attempt == 1
    assert len(Registry(bench.volume).versions("words")) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": "alexnet", "image_size": 16}, "alexnet can't take 16×16 images"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not here"),
        ({"learning_rate": 1e30, "epochs": 3, "warmup_epochs": 0}, "the loss became"),
    ],
)
def test_a_run_that_can_not_work_fails_with_one_line(bench: Bench, values: dict[str, object], message: str) -> None:
    bench.start_worker()
    record = bench.wait_for_state(bench.classifier(**values), "SUCCEEDED", "FAILED")
    assert record.state == "FAILED"
    assert message in record.message
    assert record.attempt == 1, "trying again would not help"


def test_a_full_volume_fails_the_run_with_one_line_and_keeps_the_last_checkpoint(bench: Bench) -> None:
    bench.start_worker()
    run_id = bench.language_model(**LONG)
    run = bench.volume.run(run_id)
    wait_for(lambda: len(list_checkpoints(run)) >= 2, 60.0, "two checkpoints")
    # Root ignores modes: a file in the place of the directory fails every further save, as a full disk does.
    (run / "checkpoints").rename(run / "kept")
    (run / "checkpoints").write_text("in the way")
    record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert record.state == "FAILED"
    assert "can't write" in record.message
    (run / "checkpoints").unlink()
    (run / "kept").rename(run / "checkpoints")
    resume(run_id, bench.volume, bench.store, make_celery(bench.url))
    assert bench.wait_for_state(run_id, "SUCCEEDED", "FAILED").state == "SUCCEEDED"


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
    worker.wait(30)
    home = str(bench.volume.home)
    wait_for(lambda: not [pid for pid, command in processes() if home in command and "services" in command], 10.0)
