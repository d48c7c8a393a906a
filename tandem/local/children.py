"""Child processes that end with us, however we end."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tandem.local.state import Service, process_start_time
from tandem.processes import end_with_parent, stop


class Child:
    """A service process with its log file; in a session of its own, so that a terminal's Ctrl-C is ours alone."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as log_file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                # Even if the manager is killed outright, the kernel tells each child to end.
                preexec_fn=lambda: end_with_parent(signal.SIGTERM),
            )
        self._start_time = process_start_time(self._process.pid) or 0

    def service(self, address: str = "") -> Service:
        """Return what the state file says of this child."""
        return Service(pid=self._process.pid, start_time=self._start_time, address=address, log=str(self.log))

    def is_running(self) -> bool:
        """True until the process has ended."""
        return self._process.poll() is None

    def last_line(self) -> str:
        """Return the last line that this process logged."""
        with open(self.log, "rb") as file:
            file.seek(self._log_start)
            lines = file.read()[-4096:].decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def stop(self, timeout_s: float) -> None:
        """Ask the process to end; kill its whole group if it has not after `timeout_s`, and what it left behind."""
        stop(self._process, timeout_s)
