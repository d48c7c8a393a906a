"""Which process holds something: told apart on one machine for good, and known to be gone without asking it."""

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.local.state import process_start_time
from tandem.volume import replace_json

PROCESS_FILE = "process.json"
_GONE_S = 5.0


@dataclass(frozen=True)
class Holder:
    """A process: its machine (this boot of it, this container), pid, and start time in clock ticks."""

    machine: str
    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> "Holder":
        """Return process `pid` of this machine."""
        return cls(_this_machine(), pid, process_start_time(pid) or 0)

    def is_known_gone(self) -> bool:
        """True where this machine is the process's own and it has ended; False where that can't be seen from here."""
        return self.machine == _this_machine() and process_start_time(self.pid) != self.start_time

    def token(self) -> str:
        """Return it as a word, see `parse_token`."""
        return f"{self.machine}/{self.pid}/{self.start_time}"


def parse_token(token: str) -> Holder | None:
    """Return the holder in a lease's token, None where there is none."""
    parts = token.split("/")
    with suppress(ValueError, IndexError):
        return Holder(parts[0], int(parts[1]), int(parts[2]))
    return None


def _this_machine() -> str:
    # Pids mean something in their namespace alone: two containers on one host both have a 1.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"


def note_process(run: Path, pid: int) -> None:
    """Write down which process computes for the run, so that whoever comes next can end it."""
    replace_json(run / PROCESS_FILE, asdict(Holder.of(pid)), durable=False)


def computing_process(run: Path) -> Holder | None:
    """Return the process that was last noted for the run, None where there is none."""
    try:
        return Holder(**json.loads((run / PROCESS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def end_previous(run: Path) -> None:
    """Kill the process of an earlier attempt, with all it started, if it is on this machine and still there.

    It may be frozen with its worker; then it would go on to compute when it is thawed.
    """
    previous = computing_process(run)
    if previous is None or previous.machine != _this_machine() or previous.is_known_gone():
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(previous.pid, signal.SIGKILL)
    deadline = time.monotonic() + _GONE_S
    while not previous.is_known_gone() and time.monotonic() < deadline:
        time.sleep(0.01)
