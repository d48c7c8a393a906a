"""A test rig of real parts: an embedded broker, Celery workers as processes of their own, and small real data."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from waiting import wait_for

from services.trainer.holder import computing_process
from tandem.checkpoints.files import WEIGHTS_FILE, read_pointer, read_verified
from tandem.errors import BrokerUnavailable
from tandem.jobs.broker import Broker
from tandem.jobs.queue import make_celery
from tandem.jobs.record import JobRecord
from tandem.jobs.runs import find_run
from tandem.jobs.scheduling import make_scheduling
from tandem.jobs.spec import make_spec
from tandem.jobs.store import JobStore, connect
from tandem.jobs.submit import submit
from tandem.local.broker import server_command, socket_path
from tandem.volume import Volume

# A language model that takes some seconds, and saves often.
LONG = {"epochs": 40, "checkpoint_every_s": 0.2}
# Short, and longer than a process may wait for one of two busy cores.
LEASE_S = 4.0


@dataclass
class Bench:
    """A volume with data, a broker, and the means to submit runs and to start workers."""

    volume: Volume
    url: Broker | str
    broker: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    # Of the workers, where the address alone does not let them in.
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> JobStore:
        return JobStore(connect(self.url), self.url)

    def submit(self, scheduling: dict[str, Any] | None = None, **values: object) -> str:
        made = make_scheduling(scheduling or {})
        return submit(make_spec(dict(values)), self.volume, self.store, make_celery(self.url), made).run_id

    def classifier(self, **values: Any) -> str:
        basis = {"kind": "train_classifier", "dataset": "shapes", "model_name": "shapes", "arch": "resnet18"}
        return self.submit(**{**basis, "epochs": 2, "batch_size": 16, "num_threads": 1, **values})

    def language_model(self, **values: Any) -> str:
        basis = {"kind": "train_language_model", "dataset": "words", "model_name": "words", "model": "LSTM"}
        sizes = {"embedding_size": 16, "hidden_size": 16, "batch_size": 4, "bptt": 8, "epochs": 2, "num_threads": 1}
        return self.submit(**{**basis, **sizes, **values})

    def record(self, run_id: str) -> JobRecord:
        return find_run(run_id, self.volume, self.store)

    def wait_for_state(self, run_id: str, *states: str) -> JobRecord:
        wait_for(lambda: self.record(run_id).state in states, f"{run_id} in {states}")
        return self.record(run_id)

    def wait_for_step(self, run_id: str, step: int, attempt: int = 1) -> None:
        def reached() -> bool:
            record = self.record(run_id)
            return record.attempt >= attempt and record.progress.step >= step

        wait_for(reached, f"step {step} of {run_id}")

    def start_worker(self, *prefix: str, script: Path | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker; `prefix` is what its command is run with, as `ip netns exec NAME`.

        `script` is run instead of the worker's module.

        By default it keeps no spare process: most tests end before one would be ready.
        """
        environment = {
            "TANDEM_HOME": str(self.volume.home),
            "TANDEM_REDIS_URL": str(self.url),
            "TANDEM_LEASE_S": str(LEASE_S),
            "TANDEM_PRELOAD": "0",
            "TANDEM_HEARTBEAT_FILE": str(self.volume.home / "heartbeat"),
            **self.environment,
            **environment,
        }
        with open(self.volume.home / "worker.log", "ab") as log:
            worker = subprocess.Popen(
                [*prefix, sys.executable, *([str(script)] if script else ["-m", "services.trainer.worker"])],
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.workers.append(worker)
        wait_for(lambda: any(each["pid"] == worker.pid for each in self.store.workers()), "the worker")
        return worker

    def worker_log(self) -> str:
        """Return what our workers have written."""
        return (self.volume.home / "worker.log").read_text()

    def start_broker(self, **environment: str) -> None:
        path = socket_path(self.volume.home)
        self.broker = subprocess.Popen(
            server_command(path, self.volume.home),
            stdout=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def training_processes(self, run_id: str) -> list[int]:
        """Return the living processes that compute for the run: that of its attempt, and those it has started."""
        heads = {pid for pid, command in processes() if f"/{run_id} " in command and "services.trainer.run" in command}
        noted = computing_process(self.volume.run(run_id))
        return sorted(heads | ({noted.pid} if noted is not None and not noted.is_known_gone() else set()))

    def spares(self) -> list[int]:
        """Return the training processes of our workers that wait for a run."""
        ours = {str(worker.pid) for worker in self.workers}
        return [
            pid for pid, command in processes() if "services.trainer.run --wait" in command and _ancestor(pid) in ours
        ]

    def ready_spares(self) -> list[int]:
        """Return those of `spares` that have imported everything."""
        return [pid for pid in self.spares() if _name(pid) == "tandem:ready"]

    def stop(self) -> None:
        for process in (*self.workers, self.broker):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def processes() -> Iterator[tuple[int, str]]:
    """Yield each process's pid and command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if command:
                yield int(entry.name), command


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _ancestor(pid: int) -> str:
    """Return the pid of the parent's parent: of a training process, the worker."""
    try:
        return _parent(_parent(str(pid)))
    except OSError:
        return ""


def _parent(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def answers(bench: Bench) -> bool:
    try:
        bench.store.ping()
    except BrokerUnavailable:
        return False
    return True


def weights(bench: Bench, run_id: str) -> bytes:
    """Return the bytes of the newest weights of a run."""
    checkpoint = read_pointer(bench.volume.run(run_id), "latest")
    assert checkpoint is not None
    return read_verified(checkpoint, (WEIGHTS_FILE,))[WEIGHTS_FILE]
