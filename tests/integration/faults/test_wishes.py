"""Wishes that come at bad moments: while a process starts, or while the supervisor is frozen."""

import os
import random
import signal
import time
from collections import Counter

import pytest
from rig import LEASE_S, Bench
from waiting import wait_for

from tandem.checkpoints.files import list_checkpoints
from tandem.jobs.fence import Fence
from tandem.jobs.runs import cancel, pause

# Long enough that nobody waits for its end.
ENDLESS = {"epochs": 50_000, "checkpoint_every_s": 0.2}


@pytest.mark.parametrize("preload", ["0", "1"])
def test_a_cancel_at_any_moment_of_the_start_is_heard(bench: Bench, preload: str, tried: Counter[str]) -> None:
    bench.start_worker(TANDEM_PRELOAD=preload)
    chance = random.Random(preload)
    for after_s in (0.0, 0.1, chance.uniform(0.2, 1.0), chance.uniform(1.0, 4.0)):
        run_id = bench.language_model(**ENDLESS)
        bench.wait_for_state(run_id, "RUNNING")
        time.sleep(after_s)
        cancel(run_id, bench.volume, bench.store)
        tried["cancel while it starts"] += 1
        record = bench.wait_for_state(run_id, "CANCELED", "FAILED", "SUCCEEDED")
        assert record.state == "CANCELED"
        assert "did not stop in" not in bench.worker_log(), "it was not killed"
        assert record.failures == 0


def test_a_time_limit_shorter_than_the_start_is_kept(bench: Bench, tried: Counter[str]) -> None:
    bench.start_worker()
    run_id = bench.language_model(**ENDLESS, scheduling={"time_limit_s": 0.5})
    tried["time limit while it starts"] += 1
    record = bench.wait_for_state(run_id, "CANCELED", "FAILED", "SUCCEEDED")
    assert (record.state, record.error, record.attempt) == ("FAILED", "time_limit", 1)


def test_a_drain_while_it_starts_counts_as_no_failure(bench: Bench, tried: Counter[str]) -> None:
    run_id = bench.language_model(epochs=1)
    for after_s in (0.0, 0.4, 1.5):
        worker = bench.start_worker()
        bench.wait_for_state(run_id, "RUNNING")
        time.sleep(after_s)
        worker.send_signal(signal.SIGTERM)
        tried["SIGTERM of the worker while it starts"] += 1
        worker.wait(240)
        record = bench.record(run_id)
        if record.state == "SUCCEEDED":
            return
        assert (record.state, record.failures) == ("QUEUED", 0), record.message
    bench.start_worker()
    assert bench.wait_for_state(run_id, "SUCCEEDED", "FAILED").state == "SUCCEEDED"


@pytest.mark.parametrize(("ask", "state"), [(cancel, "CANCELED"), (pause, "PAUSED")])
def test_after_its_end_a_frozen_attempt_writes_nothing(
    bench: Bench, ask: object, state: str, tried: Counter[str]
) -> None:
    """The supervisor alone is frozen, and its process computes on; another worker ends the run as somebody asked."""
    bench.start_worker()
    bench.start_worker()
    run_id = bench.language_model(**ENDLESS)
    bench.wait_for_step(run_id, 10)
    supervisor = int((bench.store.lease(run_id) or "").split("/")[1])
    # Not while it holds the lock, where nobody could go on.
    with Fence(bench.volume.run(run_id)).locked():
        os.kill(supervisor, signal.SIGSTOP)
    ask(run_id, bench.volume, bench.store)  # type: ignore[operator]
    tried[f"supervisor frozen, then {state}"] += 1
    try:
        bench.wait_for_state(run_id, state)
        time.sleep(1.0)
        kept = list_checkpoints(bench.volume.run(run_id))
        wait_for(lambda: not bench.training_processes(run_id), "the end of what computed unseen")
        assert list_checkpoints(bench.volume.run(run_id)) == kept
    finally:
        os.kill(supervisor, signal.SIGCONT)
    time.sleep(LEASE_S)
    assert bench.record(run_id).state == state
    assert list_checkpoints(bench.volume.run(run_id)) == kept
