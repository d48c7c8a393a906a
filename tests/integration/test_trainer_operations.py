"""What an operator sees of a real worker: its log, its metrics, and whether it lives."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rig import Bench, answers
from waiting import wait_for

from tandem.checkpoints.files import list_checkpoints


def scrape(bench: Bench) -> dict[tuple[str, ...], float]:
    """Return the samples by their names and the values of their labels."""
    log = bench.worker_log()
    (address,) = re.findall(r"metrics on (http://127\.0\.0\.1:\d+/metrics)", log)
    with urlopen(address, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_in_json_every_line_of_the_log_is_a_document(bench: Bench) -> None:
    worker = bench.start_worker(TANDEM_LOG_FORMAT="json", TANDEM_LOG_LEVEL="DEBUG")
    bench.wait_for_state(bench.language_model(epochs=1), "SUCCEEDED", "FAILED")
    (child,) = children(worker.pid)
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: children(worker.pid) not in ([], [child]), "another child")
    worker.send_signal(signal.SIGTERM)
    worker.wait(240)
    documents = [json.loads(line) for line in bench.worker_log().splitlines()]
    loggers = {document["logger"] for document in documents}
    assert {"celery.worker.strategy", "multiprocessing", "services.trainer.attempt"} <= loggers
    assert {"at", "level", "message"} <= set.intersection(*(set(document) for document in documents))


def test_a_worker_tells_prometheus_of_its_runs_also_those_of_dead_children(bench: Bench) -> None:
    worker = bench.start_worker(TANDEM_METRICS_LISTEN="127.0.0.1:0")
    assert scrape(bench)["tandem_attempts_total", "succeeded"] == 0
    run_id = bench.language_model()
    bench.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    wait_for(lambda: scrape(bench)["tandem_attempts_total", "succeeded"] == 1, "the count")
    found = scrape(bench)
    run = bench.volume.run(run_id)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    saved = [event for event in events if event["type"] == "checkpoint"]
    sizes = {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in list_checkpoints(run)}
    assert saved
    assert {event["checkpoint"]: event["num_bytes"] for event in saved} == sizes
    assert found["tandem_checkpoint_bytes_sum",] == sum(event["num_bytes"] for event in saved)
    assert found["tandem_checkpoint_seconds_count",] == len(saved)
    assert 0 < found["tandem_checkpoint_seconds_sum",] == pytest.approx(sum(event["seconds"] for event in saved))
    assert found["tandem_attempt_seconds_count",] == 1
    assert found["tandem_attempt_seconds_sum",] > found["tandem_checkpoint_seconds_sum",]
    assert found["tandem_step_rate", "train_language_model", "words"] == 0, "nothing is trained now"
    assert (found["tandem_attempts_running",], found["tandem_broker_up",]) == (0, 1)

    (child,) = children(worker.pid)
    os.kill(child, signal.SIGKILL)
    second = bench.language_model(model_name="second", epochs=40)
    bench.wait_for_step(second, 20)
    found = scrape(bench)
    assert found["tandem_step_rate", "train_language_model", "words"] > 0
    assert found["tandem_attempts_running",] == 1
    (process,) = bench.training_processes(second)
    os.kill(process, signal.SIGKILL)
    bench.wait_for_state(second, "SUCCEEDED", "FAILED")
    wait_for(lambda: scrape(bench)["tandem_attempts_total", "succeeded"] == 2, "the count of both")
    found = scrape(bench)
    assert found["tandem_attempts_total", "lost"] == 1
    assert found["tandem_attempt_seconds_count",] == 3


def test_without_a_broker_a_worker_is_still_scraped(bench: Bench) -> None:
    bench.start_worker(TANDEM_METRICS_LISTEN="127.0.0.1:0")
    # Not killed: nothing refuses a connection, and nothing answers.
    os.kill(bench.broker.pid, signal.SIGSTOP)
    assert scrape(bench)["tandem_broker_up",] == 0
    os.kill(bench.broker.pid, signal.SIGCONT)
    wait_for(lambda: scrape(bench)["tandem_broker_up",] == 1, "the broker")


def test_a_port_that_is_taken_or_none_ends_the_worker_with_one_line(bench: Bench) -> None:
    bench.start_worker(TANDEM_METRICS_LISTEN="127.0.0.1:0")
    log = bench.worker_log()
    (port,) = re.findall(r"metrics on http://127\.0\.0\.1:(\d+)/", log)
    basis = {**os.environ, "TANDEM_HOME": str(bench.volume.home), "TANDEM_REDIS_URL": str(bench.url)}
    for listen, says in ((f"127.0.0.1:{port}", "Address already in use"), ("here", "write HOST:PORT")):
        command = [sys.executable, "-m", "services.trainer.worker"]
        ended = subprocess.run(
            command, env={**basis, "TANDEM_METRICS_LISTEN": listen}, capture_output=True, text=True, timeout=240
        )
        assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1), ended.stderr
        assert ended.stderr.startswith("tandem trainer: ")
        assert says in ended.stderr
        assert "TANDEM_METRICS_LISTEN" in ended.stderr


def test_a_worker_without_its_broker_lives_and_one_that_is_stopped_does_not(bench: Bench) -> None:
    heartbeat = bench.volume.home / "heartbeat"

    def age_s() -> float:
        return time.time() - heartbeat.stat().st_mtime

    worker = bench.start_worker()
    wait_for(heartbeat.exists, "the first heartbeat")
    os.killpg(bench.broker.pid, signal.SIGKILL)
    bench.broker.wait()
    # Longer than its loop may stand still for another reason: Celery connects again and again in it.
    time.sleep(10.0)
    assert age_s() < 5.0
    bench.start_broker()
    wait_for(lambda: answers(bench), "the broker")
    assert age_s() < 5.0
    os.kill(worker.pid, signal.SIGSTOP)
    time.sleep(6.0)
    assert age_s() > 5.0
