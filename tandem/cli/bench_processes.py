"""The processes that `tandem bench classify` and `generate` start: the limit of the machine, and a server."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tandem.errors import Unavailable
from tandem.local.children import Child
from tandem.openmp import limit_spinning
from tandem.processes import how_it_ended, stop

_START_S = 120.0
_STOP_S = 10.0
_POLL_S = 0.05
# -P: a file called torch.py in the directory where the command is run is not the package.
_PYTHON = (sys.executable, "-P", "-m")
# A server of ours alone is on loopback, and asks nobody for anything.
_NOT_OURS = ("TANDEM_TLS_", "TANDEM_TOKEN", "TANDEM_REDIS_", "TANDEM_METRICS_", "TANDEM_LOG_", "OTEL_", "REDIS_URL")


class Limit:
    """The process that measures without a server; `facts` are what it said of the model."""

    def __init__(self, process: "subprocess.Popen[str]", log: IO[bytes], request: dict[str, Any]) -> None:
        self._process, self._log = process, log
        self.facts = self._ask(request)

    def measure(self, name: str, seconds: float, size: int = 1) -> float:
        """Return the figure `name`; see services.inference.bench.Command."""
        return float(self._ask({"measure": name, "seconds": seconds, "size": size})["value"])

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().decode("utf-8", "replace")
            raise Unavailable(f"the measuring process {how_it_ended(self._process.wait(), said)}")
        answer: dict[str, Any] = json.loads(line)
        if answer["type"] == "error":
            raise Unavailable(answer["message"])
        return answer


@contextlib.contextmanager
def limit_process(request: dict[str, Any]) -> Iterator[Limit]:
    """Start the process that answers `request` (services.inference.bench.Request), and end it afterwards.

    Raises Unavailable for what it says that it can't do.
    """
    environment = dict(os.environ)
    limit_spinning(environment)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*_PYTHON, "services.inference.bench", "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=environment,
            # A terminal's Ctrl-C is ours alone: a library in the middle of its work would print a traceback.
            start_new_session=True,
        )
        try:
            yield Limit(process, log, request)
        finally:
            stop(process, _STOP_S)
            for stream in (process.stdin, process.stdout):
                # What a process that has gone did not read can't be flushed.
                with contextlib.suppress(BrokenPipeError):
                    assert stream is not None
                    stream.close()


@contextlib.contextmanager
def own_server(home: Path, scratch: Path) -> Iterator[str]:
    """Run a server of the volume `home` on a free port of loopback; yield its address. Raises Unavailable."""
    port_file, log = scratch / "address", scratch / "server.log"
    hidden = {name: "" for name in os.environ if name.startswith(_NOT_OURS)}
    command = [*_PYTHON, "services.inference.server", "--listen", "127.0.0.1:0", "--port-file", str(port_file)]
    child = Child("inference", command, log, {**hidden, "TANDEM_HOME": str(home)})
    try:
        deadline = time.monotonic() + _START_S
        while not port_file.is_file():
            if not child.is_running():
                raise Unavailable(f"the server did not start: {child.last_line()}")
            if time.monotonic() > deadline:
                raise Unavailable(f"the server did not answer within {_START_S:.0f} s")
            time.sleep(_POLL_S)
        yield port_file.read_text().strip()
    finally:
        child.stop(_STOP_S)
