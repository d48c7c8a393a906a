"""The training process as the supervisor holds it: start, read its events, ask it to stop, end its whole group."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import ClassifierJob, LanguageModelJob, parse_spec
from tandem.openmp import limit_spinning

LOG_FILE = "log.txt"


class TrainingProcess:
    """A process in a session of its own, so that everything it starts can be ended with it."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        environment = dict(os.environ)
        limit_spinning(environment)
        with open(log, "ab") as log_file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log_file,
                env=environment,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._out = self._process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._partial = b""

    def events(self, wait_s: float) -> list[dict[str, Any]]:
        """Return the events that have come, after waiting at most `wait_s` for the first."""
        if not self._out.closed and self._selector.select(wait_s):
            data = self._out.read()
            if data == b"":
                self._selector.unregister(self._out)
                self._out.close()
            *lines, self._partial = (self._partial + (data or b"")).split(b"\n")
            return [json.loads(line) for line in lines if line]
        return []

    def has_ended(self) -> bool:
        """True when the process has ended and all its events have been read."""
        if self._out.closed:
            self._process.wait()
        return self._out.closed

    def ask_to_stop(self, for_good: bool = False) -> None:
        """Ask it to save and end, maybe for good; what it has started (loaders, ranks) is its own to end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if for_good else signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group at once, and wait for it."""
        # It may have ended by itself just now.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        self._out.close()

    def ending(self) -> str:
        """Say in words how the process ended."""
        code = self._process.returncode
        if code is None:
            return "still runs"
        if code < 0:
            name = signal.Signals(-code).name
            return f"was killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        return f"ended with exit code {code} and no status"


def training_command(run: Path, attempt: int) -> list[str]:
    """Return the command that runs one attempt of the run in directory `run`, in as many processes as its spec says."""
    spec = parse_spec((run / SPEC_FILE).read_bytes())
    arguments = [str(run), "--attempt", str(attempt), "--parent", str(os.getpid())]
    if isinstance(spec, ClassifierJob | LanguageModelJob) and spec.is_distributed:
        several = ["--processes", str(spec.num_devices)]
        return [sys.executable, "-m", "services.trainer.distributed", *arguments, *several]
    return [sys.executable, "-m", "services.trainer.run", *arguments]
