"""A real inference server in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from tandem.volume import Volume

COMMAND = (sys.executable, "-m", "services.inference.server")
ROOT = Path(__file__).parents[1]
# Of the 70 images of the dataset `shapes`.
BROKEN_PLACES = (3, 40)


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_") and name != "REDIS_URL"}
    # Two threads whatever the machine has, so that servers and tests don't starve each other.
    return {**kept, "OMP_NUM_THREADS": "2", "TANDEM_DEVICE": "cpu", **changes}


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    address: str
    volume: Volume
    log: Path

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 120.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(120)


def start_server(directory: Path, volume: Volume, listen: str = "127.0.0.1:0", **changes: str) -> ServerProcess:
    """Start a server, by default on a free port; return once it listens."""
    directory.mkdir(parents=True, exist_ok=True)
    port_file, log = directory / "port", directory / "server.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*COMMAND, "--listen", listen, "--home", str(volume.home), "--port-file", str(port_file)],
            cwd=ROOT,
            env=environment(**changes),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    deadline = time.monotonic() + PATIENCE_S
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the server did not start: {log.read_text()}")
        time.sleep(0.05)
    return ServerProcess(process, port_file.read_text().strip(), volume, log)


def refused_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the server's main in this process, which is to exit with 1; return its one line."""
    # Here, since most tests need no more of it than its command.
    from services.inference.server import main

    monkeypatch.setattr(sys, "argv", ["server", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line
