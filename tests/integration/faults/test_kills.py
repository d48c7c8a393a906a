"""Runs that are disturbed at random moments: each ends once, in the same bytes, and leaves nothing behind.

TANDEM_FAULT_TRIALS sets how often each fault is tried (1); each trial has a seed of its own.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig import LEASE_S, Bench, answers, processes
from samples import write_text_dataset
from training_process import end_state, finish, new_run
from waiting import wait_for

from services.trainer.holder import computing_process
from tandem.checkpoints.files import list_checkpoints, read_verified
from tandem.checkpoints.registry import Registry
from tandem.jobs.queue import make_celery, send_run
from tandem.jobs.store import connect
from tandem.volume import Volume

TRIALS = range(int(os.environ.get("TANDEM_FAULT_TRIALS", "1")))
# Some seconds, with some tens of saves: wherever it is disturbed, it is near one.
SPEC: dict[str, float] = {"embedding_size": 16, "hidden_size": 16, "batch_size": 4, "bptt": 8, "num_threads": 1}
SPEC |= {"epochs": 40, "checkpoint_every_s": 0.1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what the run ends in when nobody disturbs it."""
    volume = Volume(tmp_path_factory.mktemp("undisturbed"))
    write_text_dataset(volume, "words")
    values = {"kind": "train_language_model", "dataset": "words", "model_name": "words", "model": "LSTM", **SPEC}
    run = new_run(volume, "undisturbed", values)
    finish(run)
    return end_state(run)


@dataclass
class Scene:
    """A run that computes, two workers, and what chance says."""

    bench: Bench
    run_id: str
    chance: random.Random

    @property
    def run(self) -> Path:
        return self.bench.volume.run(self.run_id)

    def at_random_moment(self) -> None:
        """Come back at some moment of the run, from its start on; most are within its steps."""
        if self.chance.random() < 0.7:
            self.bench.wait_for_step(self.run_id, self.chance.randrange(1, 500))
        time.sleep(self.chance.uniform(0.0, 1.0))

    def kill(self, find: Callable[[], int | None], number: signal.Signals = signal.SIGKILL) -> bool:
        """Send a signal to what `find` finds; False if the run has ended by now."""
        while not self.bench.record(self.run_id).state.is_terminal:
            pid = find()
            if pid is not None:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
                return True
            time.sleep(0.02)
        return False

    def training_process(self) -> int | None:
        holder = computing_process(self.run)
        return None if holder is None or holder.is_known_gone() else holder.pid

    def supervisor(self) -> int | None:
        """Return the Celery child that holds the run."""
        token = self.bench.store.lease(self.run_id)
        return None if token is None else int(token.split("/")[1])

    def worker(self) -> int | None:
        child = self.supervisor()
        return None if child is None else parent(child)


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for each, _ in processes():
        children.setdefault(parent(each) or 0, []).append(each)
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def kill_training_process(scene: Scene) -> None:
    scene.kill(scene.training_process)


def kill_supervisor(scene: Scene) -> None:
    scene.kill(scene.supervisor)


def kill_worker(scene: Scene) -> None:
    if scene.kill(scene.worker):
        scene.bench.start_worker()


def stop_worker(scene: Scene) -> None:
    if scene.kill(scene.worker, signal.SIGTERM):
        scene.bench.start_worker()


def freeze_worker(scene: Scene) -> None:
    """SIGSTOP the worker with all its processes for longer than its lease, then SIGCONT."""
    worker = scene.worker()
    if worker is None:
        return
    frozen = family(worker)
    for pid in frozen:
        send(pid, signal.SIGSTOP)
    time.sleep(LEASE_S * scene.chance.uniform(1.2, 2.0))
    for pid in frozen:
        send(pid, signal.SIGCONT)


def freeze_supervisor(scene: Scene) -> None:
    """SIGSTOP the supervisor alone: its process computes on, and nobody renews the lease."""
    child = scene.supervisor()
    if child is None:
        return
    send(child, signal.SIGSTOP)
    time.sleep(LEASE_S * 2)
    send(child, signal.SIGCONT)


def kill_broker(scene: Scene) -> None:
    os.killpg(scene.bench.broker.pid, signal.SIGKILL)
    scene.bench.broker.wait()
    time.sleep(scene.chance.uniform(0.0, 1.5 * LEASE_S))
    scene.bench.start_broker()
    wait_for(lambda: answers(scene.bench), "the broker")


def repeat_messages(scene: Scene) -> None:
    app = make_celery(scene.bench.url)
    for _ in range(5):
        send_run(app, scene.bench.record(scene.run_id))
        time.sleep(scene.chance.uniform(0.0, 0.4))


def send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


FAULTS = {
    "SIGKILL of the training process": kill_training_process,
    "SIGKILL of the supervisor": kill_supervisor,
    "SIGKILL of the worker": kill_worker,
    "SIGTERM of the worker": stop_worker,
    "SIGSTOP of the worker for longer than its lease": freeze_worker,
    "SIGSTOP of the supervisor for longer than its lease": freeze_supervisor,
    "SIGKILL of the broker, and a restart": kill_broker,
    "messages delivered again": repeat_messages,
}


@pytest.fixture
def scene(bench: Bench, request: pytest.FixtureRequest) -> Scene:
    chance = random.Random(f"{request.node.name}")
    bench.start_worker()
    bench.start_worker(TANDEM_PRELOAD="1")
    return Scene(bench, bench.language_model(**SPEC), chance)


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_disturbed_run_ends_once_and_in_the_same_bytes(
    scene: Scene, fault: str, trial: int, undisturbed: dict[str, bytes], tried: Counter[str]
) -> None:
    times = 1 if fault.startswith(("SIGSTOP", "messages")) else 2
    for _ in range(times):
        scene.at_random_moment()
        FAULTS[fault](scene)
        tried[fault] += 1
    check_end(scene, undisturbed)


def check_end(scene: Scene, undisturbed: dict[str, bytes]) -> None:
    """The run has succeeded, once, in the bytes of the undisturbed one; nothing computes on, no attempt overlapped."""
    bench = scene.bench
    record = bench.wait_for_state(scene.run_id, "SUCCEEDED", "FAILED", "CANCELED")
    assert record.state == "SUCCEEDED", record.message
    assert [version.run_id for version in Registry(bench.volume).versions("words")] == [scene.run_id]
    assert end_state(scene.run) == undisturbed
    for checkpoint in list_checkpoints(scene.run):
        read_verified(checkpoint)
    wait_for(lambda: not bench.training_processes(scene.run_id), "the end of what computed")
    attempts = [json.loads(line)["attempt"] for line in (scene.run / "events.jsonl").read_text().splitlines()]
    assert attempts == sorted(attempts), "an attempt wrote when a later one had begun"
    assert record.attempt == max(attempts)
    wait_for(lambda: bench.record(scene.run_id) == bench.store.get(scene.run_id), "the mirror")


def test_a_broker_that_is_gone_for_half_a_minute_costs_no_attempt(
    scene: Scene, undisturbed: dict[str, bytes], tried: Counter[str]
) -> None:
    scene.bench.wait_for_step(scene.run_id, 10)
    os.killpg(scene.bench.broker.pid, signal.SIGKILL)
    scene.bench.broker.wait()
    time.sleep(30.0)
    tried["broker gone for 30 s"] += 1
    scene.bench.start_broker()
    wait_for(lambda: answers(scene.bench), "the broker")
    check_end(scene, undisturbed)
    assert scene.bench.record(scene.run_id).attempt == 1


def test_a_clock_that_steps_costs_no_attempt(
    bench: Bench, undisturbed: dict[str, bytes], tried: Counter[str], tmp_path: Path
) -> None:
    """Redis' clock, by which leases and backoffs expire, jumps an hour ahead in the middle of a run, and back."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime: apt-get install faketime")
    clock = tmp_path / "clock"
    clock.write_text("+0s")
    os.killpg(bench.broker.pid, signal.SIGKILL)
    bench.broker.wait()
    fake = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    bench.start_broker(**fake, FAKETIME_DONT_FAKE_MONOTONIC="1")
    wait_for(lambda: answers(bench), "the broker")
    before = connect(bench.url).time()[0]
    for _ in range(2):
        bench.start_worker()
    scene = Scene(bench, bench.language_model(**SPEC), random.Random(0))
    for offset in ("+3600s", "-3600s"):
        bench.wait_for_step(scene.run_id, 10)
        clock.write_text(offset)
        tried[f"the broker's clock steps by {offset}"] += 1
        wait_for(lambda: abs(connect(bench.url).time()[0] - before) > 3000, "the step")
        time.sleep(1.0)
    check_end(scene, undisturbed)
    assert bench.record(scene.run_id).attempt == 1


SHORT_VISIBILITY = """
from tandem.jobs import queue
queue._TRANSPORT.update(visibility_timeout=1, unacked_restore_interval=1)
queue._SETTINGS["visibility_timeout"] = 1
from services.trainer.worker import main
main()
"""


def test_a_visibility_timeout_shorter_than_the_run_gives_it_to_nobody_else(
    bench: Bench, undisturbed: dict[str, bytes], tried: Counter[str], tmp_path: Path
) -> None:
    script = tmp_path / "services.trainer.worker.short.py"
    script.write_text(SHORT_VISIBILITY)
    for _ in range(2):
        bench.start_worker(script=script)
    scene = Scene(bench, bench.language_model(**SPEC), random.Random(0))
    tried["visibility timeout shorter than the run"] += 1
    check_end(scene, undisturbed)
    assert bench.record(scene.run_id).attempt == 1
