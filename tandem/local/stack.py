"""The whole system on this machine: starts broker, trainer, inference and TensorBoard, watches them, stops them.

Services are started by their module names; this package imports none of them.
"""

import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import Conflict, TandemError, Unavailable
from tandem.jobs.broker import VARIABLES, Broker
from tandem.jobs.store import JobStore, connect
from tandem.local.broker import broker_url, server_command, socket_path
from tandem.local.children import Child
from tandem.local.state import STATE_FILE, Service, SystemState, own_service
from tandem.settings import Settings
from tandem.volume import Volume, replace_json, volume_errors

_START_TIMEOUT_S = 90.0
_WAIT_S = 0.05
# In the order of stopping: the trainer saves while the broker still listens. Inference also gets what its drain takes.
_STOP_TIMEOUTS_S = {"trainer": 90.0, "inference": 10.0, "tensorboard": 5.0, "broker": 15.0}
_MOST_RESTARTS = 5
_SOON_S = 300.0


@dataclass(frozen=True)
class Ports:
    """Loopback ports to listen on; 0 takes a free one."""

    inference: int = 0
    tensorboard: int = 0


class Stack:
    """The services of one volume; use as a context manager, so that nothing is left running."""

    def __init__(
        self,
        settings: Settings,
        ports: Ports = Ports(),
        with_tensorboard: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.volume = Volume(settings.home, settings.checkpoint_store)
        # For people: without passwords. `broker` is set once it is known.
        self.addresses: dict[str, str] = {}
        self.broker: Broker
        self._ports = ports
        self._with_tensorboard = with_tensorboard
        self._say = say
        self._children: dict[str, Child] = {}
        self._restarts: dict[str, tuple[int, float]] = {}
        self._lock: int | None = None

    def __enter__(self) -> "Stack":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and return when all of it answers; raise a TandemError that says what did not."""
        with volume_errors(self.settings.home):
            for directory in (self.volume.datasets, self.volume.runs, self.volume.models, self.volume.local):
                directory.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        if self._with_tensorboard:
            self.addresses["tensorboard"] = f"http://127.0.0.1:{tensorboard_port(self._ports.tensorboard)}"
        self._start_broker()
        # Trainer and inference start side by side: most of their time is importing.
        self._launch("trainer")
        self._launch("inference")
        if self._with_tensorboard:
            self._launch("tensorboard")
        self._await_inference()
        self._await_trainer()
        if self._with_tensorboard:
            self._await("tensorboard", lambda: _listens(self.addresses["tensorboard"]))
        self._write_state()

    def _take_lock(self) -> None:
        self._lock = os.open(self.volume.local / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise Conflict(f"{self.volume.home} has a system running already; 'tandem status' shows it") from None

    def _start_broker(self) -> None:
        if self.settings.broker:
            self.broker = self.settings.broker
        else:
            path = socket_path(self.volume.local)
            self._broker_command = server_command(path, self.volume.local)
            self.broker = Broker.of(broker_url(path))
            self._launch("broker")
        self.addresses["broker"] = str(self.broker)
        store = JobStore(connect(self.broker), self.broker)
        if self.settings.broker:
            # Not ours to start: what is wrong with it is said at once.
            store.ping()
        self._await("broker", lambda: _succeeds(store.ping))

    def _launch(self, name: str) -> None:
        environment = {"TANDEM_HOME": str(self.settings.home)}
        if not self.settings.broker:
            # Another broker is inherited with all that belongs to it; none of that is for ours.
            environment.update(dict.fromkeys(VARIABLES, ""), TANDEM_REDIS_URL=str(self.broker))
        log = self.volume.local / f"{name}.log"
        if name == "inference":
            self._port_file.unlink(missing_ok=True)
            environment |= _metrics_of_inference(self.settings.metrics_listen)
        self._children[name] = Child(name, self._command(name), log, environment)

    def _command(self, name: str) -> list[str]:
        python = [sys.executable, "-m"]
        if name == "broker":
            return self._broker_command
        if name == "trainer":
            return [*python, "services.trainer.worker"]
        if name == "tensorboard":
            port = self.addresses["tensorboard"].rpartition(":")[2]
            options = ["--logdir", str(self.volume.runs), "--host", "127.0.0.1", "--port", port]
            return [*python, "tensorboard.main", *options]
        # A restarted server comes back where its clients know it.
        listen = self.addresses.get("inference") or f"127.0.0.1:{self._ports.inference}"
        return [*python, "services.inference.server", "--listen", listen, "--port-file", str(self._port_file)]

    @property
    def _port_file(self) -> Path:
        return self.volume.local / "inference.address"

    def _await_inference(self) -> None:
        self._await("inference", self._port_file.is_file)
        self.addresses["inference"] = self._port_file.read_text().strip()

    def _await_trainer(self) -> None:
        store = JobStore(connect(self.broker), self.broker)
        ours = {"pid": self._children["trainer"].service().pid, "host": socket.gethostname()}
        self._await("trainer", lambda: any(ours.items() <= worker.items() for worker in store.workers()))

    def _await(self, name: str, is_ready: Callable[[], bool]) -> None:
        self._say(f"waiting for {name}")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not is_ready():
            child = self._children.get(name)
            if child is not None and not child.is_running():
                raise Unavailable(f"{name} did not start: {child.last_line()}")
            if time.monotonic() > deadline:
                log = child.log if child else self.addresses.get(name, "")
                raise Unavailable(f"{name} did not answer within {_START_TIMEOUT_S:.0f} s; see {log}")
            time.sleep(_WAIT_S)

    def _write_state(self) -> None:
        services = {name: child.service(self.addresses.get(name, "")) for name, child in self._children.items()}
        if "broker" not in services:
            services["broker"] = Service(pid=0, start_time=0, address=self.addresses["broker"])
        state = SystemState(manager=own_service(), services=services)
        replace_json(self.volume.local / STATE_FILE, state.model_dump(mode="json"))

    def restart_dead(self) -> None:
        """Start again what ended by itself, up to a few times each."""
        for name, child in list(self._children.items()):
            if child.is_running():
                continue
            count = self._count_restart(name)
            if count > _MOST_RESTARTS:
                said = f"{name} ended {count} times; the last it said: {child.last_line()} ({child.log})"
                if name != "tensorboard":
                    raise Unavailable(said)
                # Only people look at it: the rest goes on.
                self._say(said)
                del self._children[name]
                continue
            self._say(f"{name} ended ({child.last_line()}); starting it again")
            time.sleep(min(0.5 * 2**count, 10.0))
            self._launch(name)
            self._write_state()

    def _count_restart(self, name: str) -> int:
        """Return how many times in a row the service has ended, each soon after the last."""
        count, at = self._restarts.get(name, (0, 0.0))
        now = time.monotonic()
        count = count + 1 if now - at < _SOON_S else 1
        self._restarts[name] = (count, now)
        return count

    def stop(self) -> None:
        """Stop what was started, the trainer first so that it can save; safe to call twice."""
        drain_s = (self.settings.drain_delay_s or 0.0) + self.settings.drain_grace_s
        for name, timeout_s in _STOP_TIMEOUTS_S.items():
            if child := self._children.pop(name, None):
                self._say(f"stopping {name}")
                with _undisturbed():
                    child.stop(timeout_s + (drain_s if name == "inference" else 0.0))
        if self._lock is not None:
            (self.volume.local / STATE_FILE).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let an impatient second Ctrl-C not break the stopping off: it would leave processes behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _succeeds(action: Callable[[], None]) -> bool:
    try:
        action()
    except TandemError:
        return False
    return True


def _listens(url: str) -> bool:
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, int(port))) == 0


def tensorboard_port(port: int) -> int:
    """Return loopback port `port`, or a free one for 0; raise Unavailable if it is in use.

    TensorBoard does not say which free port it took, so one is picked for it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise Unavailable(
                f"tensorboard can't listen on 127.0.0.1:{port}: {error.strerror}; take another"
            ) from error
        return int(probe.getsockname()[1])


def _metrics_of_inference(listen: tuple[str, int] | None) -> dict[str, str]:
    """Return where the inference server answers Prometheus: one port above the trainer, which has the same variable."""
    if listen is None:
        return {}
    host, port = listen
    bracketed = f"[{host}]" if ":" in host else host
    return {"TANDEM_METRICS_LISTEN": f"{bracketed}:{port + 1 if port else 0}"}
