"""Workers that carry one run and end, and the keeper that sees to what waits while there is none."""

import os
import signal
import subprocess
import sys

import pytest
from rig import LONG, Bench
from waiting import wait_for

from tandem.jobs.queue import priority_keys
from tandem.jobs.record import State

# Named before anything is submitted, as the keeper does.
QUEUE = "default"


def start(bench: Bench, module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    environment = {
        "TANDEM_HOME": str(bench.volume.home),
        "TANDEM_REDIS_URL": str(bench.url),
        "TANDEM_LEASE_S": "4",
        "TANDEM_PRELOAD": "0",
        "TANDEM_HEARTBEAT_FILE": str(bench.volume.home / f"heartbeat-{module}"),
    }
    with open(bench.volume.home / "worker.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.trainer.{module}", *arguments],
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    bench.workers.append(process)
    return process


def waiting(bench: Bench) -> int:
    return sum(bench.store.count_messages(priority_keys(QUEUE)))


def test_a_worker_takes_one_run_and_leaves_the_next_in_the_queue(bench: Bench) -> None:
    bench.store.add_queues([QUEUE])
    first, second = bench.language_model(epochs=1), bench.language_model(epochs=1, seed=1)
    worker = start(bench, "worker", "--one-run", "--queues", QUEUE)
    assert worker.wait(120) == 0, bench.worker_log()
    assert bench.record(first).state == "SUCCEEDED"
    assert (bench.record(second).state, bench.record(second).attempt) == ("QUEUED", 0)
    # The message lies in the list that an autoscaler looks at.
    assert waiting(bench) == 1
    assert start(bench, "worker", "--one-run", "--queues", QUEUE).wait(120) == 0
    assert bench.record(second).state == "SUCCEEDED"
    assert waiting(bench) == 0


def test_a_worker_for_whom_nothing_is_left_ends(bench: Bench) -> None:
    bench.store.add_queues([QUEUE])
    run_id = bench.language_model(epochs=1)
    bench.store.update(run_id, lambda record: record.model_copy(update={"state": State.CANCELED}))
    worker = start(bench, "worker", "--one-run", "--queues", QUEUE, "--idle-exit-s", "2")
    assert worker.wait(60) == 0
    assert "no run came in 2 s: this worker ends" in bench.worker_log()
    assert waiting(bench) == 0


def test_a_worker_takes_from_no_other_queue(bench: Bench) -> None:
    bench.store.add_queues([QUEUE, "cpu"])
    run_id = bench.language_model(epochs=1, device="cpu")
    assert start(bench, "worker", "--one-run", "--queues", QUEUE, "--idle-exit-s", "2").wait(60) == 0
    assert bench.record(run_id).state == "QUEUED"


def test_a_stop_saves_and_hands_the_run_on(bench: Bench) -> None:
    bench.store.add_queues([QUEUE])
    run_id = bench.language_model(**LONG)
    worker = start(bench, "worker", "--one-run", "--queues", QUEUE)
    bench.wait_for_step(run_id, 1)
    worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    assert bench.record(run_id).state == "QUEUED"
    assert waiting(bench) == 1, "an autoscaler starts the next worker"


def test_the_keeper_finds_a_run_whose_only_worker_was_killed(bench: Bench) -> None:
    keeper = start(bench, "keeper", "--queues", f"{QUEUE},gpu-x8")
    wait_for(lambda: bench.store.served_queues() == [QUEUE, "gpu-x8"], "the queues")
    run_id = bench.language_model(**LONG)
    worker = start(bench, "worker", "--one-run", "--queues", QUEUE)
    bench.wait_for_step(run_id, 1)
    assert waiting(bench) == 0
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    wait_for(lambda: waiting(bench) == 1, "a message for the next worker")
    assert bench.record(run_id).state == "QUEUED"
    assert start(bench, "worker", "--one-run", "--queues", QUEUE).wait(120) == 0
    assert bench.record(run_id).state == "SUCCEEDED"
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(30) == 0


@pytest.mark.parametrize("module", ["worker", "keeper"])
def test_a_queue_that_no_job_leads_to_is_one_line(bench: Bench, module: str) -> None:
    process = start(bench, module, "--queues", "gqu")
    assert process.wait(60) == 1
    assert "no job leads to a queue 'gqu'" in bench.worker_log()
