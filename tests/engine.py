"""A container engine: the one that is there, or one of our own with its data in a directory of the test's."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
# The images take 8 GB, and what is fetched for them 3 GB meanwhile.
_NEEDED_BYTES = 16 * 10**9


@dataclass(frozen=True)
class Engine:
    """An engine that answers at `host`, a URL."""

    host: str

    @property
    def environment(self) -> dict[str, str]:
        # Debian's client has BuildKit built in; another that comes before it on a PATH may lack the plugin.
        path = f"/usr/bin:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "1"}

    def run(self, *arguments: str, stdin: bytes | None = None) -> str:
        done = subprocess.run(["docker", *arguments], input=stdin, env=self.environment, capture_output=True)
        assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr.decode()}"
        return done.stdout.decode().strip()


@contextmanager
def engine_for_tests(directory: Path) -> Iterator[Engine]:
    """Yield an engine; skip the test where there is none and none can be started."""
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if not host.startswith("unix://"):
        pytest.skip(f"the tests look at processes and files of the engine's host, and {host} is another")
    if shutil.which("docker") and _answers(Engine(host)):
        yield Engine(host)
        return
    for program, package in (("dockerd", "docker.io"), ("docker", "docker.io"), ("iptables", "iptables")):
        if not shutil.which(program):
            pytest.skip(f"no container engine answers, and {program} is not here: apt-get install {package}")
    if os.geteuid() != 0:
        pytest.skip("no container engine answers, and only root may start one")
    if shutil.disk_usage(directory).free < _NEEDED_BYTES:
        pytest.skip(f"an engine of the test's own needs {_NEEDED_BYTES // 10**9} GB below {directory}")
    yield from _own_engine(directory)


def _own_engine(directory: Path) -> Iterator[Engine]:
    engine, log = Engine(f"unix://{directory}/docker.sock"), directory / "dockerd.log"
    # No bridge that all share: it would stay behind, and each project makes its own.
    command = f"dockerd --data-root {directory}/data --exec-root {directory}/exec --pidfile {directory}/pid".split()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--host", engine.host, "--bridge", "none"],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _answers(engine):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"no container engine can be started here: {log.read_text().strip().splitlines()[-1:]}")
            time.sleep(0.2)
        yield engine
    finally:
        _end(process)
        shutil.rmtree(directory, ignore_errors=True)
    assert str(directory) not in Path("/proc/mounts").read_text()
    assert not directory.exists()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(engine: Engine) -> bool:
    try:
        done = subprocess.run(["docker", "info"], env=engine.environment, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
