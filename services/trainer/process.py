"""The training process as the supervisor holds it: start, read its events, ask it to stop, end its whole group."""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from services.trainer.reporter_files import LOG_FILE
from services.trainer.slots import WHOLE, Slot
from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import ClassifierJob, LanguageModelJob, parse_spec
from tandem.openmp import limit_spinning


class TrainingProcess:
    """A process in a session of its own, so that everything it starts can be ended with it."""

    def __init__(self, command: Sequence[str], log: Path | None = None, slot: Slot = WHOLE) -> None:
        environment = {**os.environ, **slot.environment()}
        limit_spinning(environment)
        with open(log, "ab") if log else nullcontext() as log_file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                env=environment,
                start_new_session=True,
                # Before it imports what counts the cores.
                preexec_fn=slot.enter if slot.cores else None,
            )
        assert self._process.stdout is not None
        self._out = self._process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._partial = b""

    # Of several: torchrun must be asked once.
    is_one = True

    @property
    def pid(self) -> int:
        """Its pid, which is that of its process group too."""
        return self._process.pid

    def is_running(self) -> bool:
        """True until the process has ended."""
        return self._process.poll() is None

    def assign(self, run: Path, attempt: int) -> bool:
        """Give a spare process its run; False if it has died meanwhile."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"run": str(run), "attempt": attempt}).encode() + b"\n")
            self._process.stdin.close()
        return self.is_running()

    def events(self, wait_s: float) -> list[dict[str, Any]]:
        """Return the events that have come, after waiting at most `wait_s` for the first."""
        if not self._out.closed and self._selector.select(wait_s):
            data = self._out.read()
            if data == b"":
                self._selector.unregister(self._out)
                self._out.close()
            *lines, self._partial = (self._partial + (data or b"")).split(b"\n")
            return [event for line in lines if (event := _event(line)) is not None]
        return []

    def has_ended(self) -> bool:
        """True when the process has ended and all its events have been read."""
        if self._out.closed:
            self._process.wait()
        return self._out.closed

    def ask_to_stop(self, for_good: bool = False) -> None:
        """Ask it to save and end, maybe for good; what it has started (loaders, ranks) is its own to end.

        It may be asked again: a process that is just starting hears nothing yet.
        """
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if for_good else signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group at once, and wait for it."""
        # It may have ended by itself just now.
        with suppress(ProcessLookupError):
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


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        # Printed by a library before standard output was taken away from it.
        return None
    return event if isinstance(event, dict) and "type" in event else None


def several_processes(run: Path) -> int:
    """Return in how many processes the spec of the run directory `run` is to be computed."""
    spec = parse_spec((run / SPEC_FILE).read_bytes())
    return spec.num_devices if isinstance(spec, ClassifierJob | LanguageModelJob) else 1


def training_command(run: Path, attempt: int) -> list[str]:
    """Return the command that runs one attempt of the run in directory `run`, in as many processes as its spec says."""
    arguments = [str(run), "--attempt", str(attempt), "--parent", str(os.getpid())]
    if (processes := several_processes(run)) > 1:
        return [sys.executable, "-m", "services.trainer.distributed", *arguments, "--processes", str(processes)]
    return [sys.executable, "-m", "services.trainer.run", *arguments]


class Spare:
    """A training process that has imported everything and waits for its run: that is most of the time to a first step.

    None is kept while a run computes in the slot; `ready` begins one when it is over.
    """

    def __init__(self, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._process: TrainingProcess | None = None
        self.slot = WHOLE

    def ready(self) -> None:
        """Begin a process that waits, unless there is one."""
        if self._is_wanted and (self._process is None or not self._process.is_running()):
            self.drop()
            command = [sys.executable, "-m", "services.trainer.run", "--wait", "--parent", str(os.getpid())]
            self._process = TrainingProcess(command, slot=self.slot)

    def start(self, run: Path, attempt: int) -> TrainingProcess:
        """Return a process that computes the attempt: the one that waits, or a new one."""
        process, self._process = self._process, None
        if process is not None and several_processes(run) == 1 and process.assign(run, attempt):
            return process
        if process is not None:
            process.kill()
        made = TrainingProcess(training_command(run, attempt), run / LOG_FILE, self.slot)
        made.is_one = several_processes(run) == 1
        return made

    def drop(self) -> None:
        """End the process that waits."""
        if self._process is not None:
            self._process.kill()
            self._process = None
