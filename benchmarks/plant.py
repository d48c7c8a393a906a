"""A broker, a volume with a small text, and workers as processes of their own, for the benchmarks of jobs."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tandem.data.prepare.text import prepare_text
from tandem.errors import BrokerUnavailable
from tandem.jobs.queue import make_celery
from tandem.jobs.record import JobRecord
from tandem.jobs.spec import JobSpec, make_spec
from tandem.jobs.store import JobStore, connect
from tandem.jobs.submit import submit
from tandem.local.broker import broker_url, server_command, socket_path
from tandem.volume import Volume

_POLL_S = 0.005
_TIMEOUT_S = 120.0


class Plant:
    """What the jobs of one volume need; nothing outlives the `with` block of `plant`."""

    def __init__(self, home: Path) -> None:
        self.volume = Volume(home)
        socket = socket_path(home)
        self.url = broker_url(socket)
        self._broker_command = server_command(socket, home)
        self.app = make_celery(self.url)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.start_broker()
        self.store = JobStore(connect(self.url), self.url)
        wait_for(self._answers)
        prepare_text(self.volume, _write_text(home / "text.txt"), "words")

    def start_broker(self) -> None:
        """Start the broker on its append-only file."""
        self.broker = self._start(self._broker_command)

    def _start(self, command: list[str], **environment: str) -> "subprocess.Popen[bytes]":
        with open(self.volume.home / "log", "ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **environment}, start_new_session=True
            )
        self.processes.append(process)
        return process

    def start_worker(self) -> "subprocess.Popen[bytes]":
        """Start a worker with the settings that users have, and wait until its spare process is ready."""
        environment = {"TANDEM_HOME": str(self.volume.home), "TANDEM_REDIS_URL": self.url}
        environment["TANDEM_HEARTBEAT_FILE"] = str(self.volume.home / "heartbeat")
        worker = self._start([sys.executable, "-m", "services.trainer.worker"], **environment)
        wait_for(lambda: any(each["pid"] == worker.pid for each in self.store.workers()))
        self.workers.append(worker)
        self.await_spares()
        return worker

    def await_spares(self) -> None:
        """Wait until each worker has a training process that waits with everything imported."""
        for worker in self.workers:
            if worker.poll() is None:
                wait_for(partial(_waits, worker.pid))

    def _answers(self) -> bool:
        try:
            self.store.ping()
        except BrokerUnavailable:
            return False
        return True

    def restart_broker(self) -> None:
        """SIGKILL the broker, and start it on its append-only file."""
        self.broker.kill()
        self.broker.wait()
        self.start_broker()
        wait_for(self._answers)

    def spec(self, **values: object) -> JobSpec:
        """Return a small language model that trains for long."""
        sizes = {"embedding_size": 64, "hidden_size": 64, "batch_size": 8, "bptt": 16, "epochs": 5000, "num_threads": 1}
        basis = {"kind": "train_language_model", "dataset": "words", "model_name": "words", "model": "LSTM"}
        return make_spec({**basis, **sizes, "checkpoint_every_s": 2.0, **values})

    def submit(self, **values: object) -> str:
        """Submit a run of `spec`; return its id."""
        return submit(self.spec(**values), self.volume, self.store, self.app).run_id

    def record(self, run_id: str) -> JobRecord:
        """Return what the broker knows of a run."""
        record = self.store.get(run_id)
        assert record is not None
        return record

    def stop(self) -> None:
        """End all processes."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def plant() -> Iterator[Plant]:
    """Set one up in a temporary directory, and take it down."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-", ignore_cleanup_errors=True) as folder:
        made = Plant(Path(folder))
        try:
            yield made
        finally:
            made.stop()


def wait_for(condition: Callable[[], object]) -> float:
    """Wait until `condition` holds; return when (time.time)."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} did not come about")
        time.sleep(_POLL_S)
    return time.time()


def children(pid: int) -> list[int]:
    """Return the child processes of `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def _waits(worker: int) -> bool:
    """True once a training process of the worker sleeps in a read with everything imported."""
    spares = [grandchild for child in children(worker) for grandchild in children(child)]
    return any(_status(pid, "Name").startswith("tandem:ready") for pid in spares)


def _status(pid: int, key: str) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def cpu_s(pid: int) -> float:
    """Return the processor time that process `pid` has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _write_text(path: Path) -> Path:
    chance = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    path.write_text("\n".join(" ".join(chance.choices(words, k=12)) for _ in range(2000)) + "\n")
    return path
