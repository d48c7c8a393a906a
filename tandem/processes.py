"""Child processes of ours: bound to their parent's life, ended in order, and what to say of their end."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# How long the killed may take to go.
_KILLED_S = 2.0
# Looked up before any fork: between fork and exec little may be called.
_libc = ctypes.CDLL(None)


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal `number` when its parent dies, however the parent dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; exit at once where `parent` has died already."""
    end_with_parent()
    if os.getppid() != parent:
        sys.exit("the parent process has gone")


def name_process(name: str) -> None:
    """Have `ps` and `top` show this process as `name`, of which they see 15 bytes."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15])


def stop(process: "subprocess.Popen[Any]", timeout_s: float) -> None:
    """Ask `process`, the head of a session, to end; after `timeout_s` kill it; kill what it left behind.

    When this returns, none of them writes any more.
    """
    if process.poll() is None:
        process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    finally:
        process_group = process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process_group, signal.SIGKILL)
        process.wait()
        _wait_for_group(process_group)


def _wait_for_group(process_group: int) -> None:
    # Not our children, so there is nothing to wait on. Bounded: where no init reaps them, the dead stay in the group.
    deadline = time.monotonic() + _KILLED_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process_group, 0)
            time.sleep(0.01)


def how_it_ended(code: int, log: str, when_killed: str = "") -> str:
    """Return the end of a sentence about a process that ended with `code` (as in `Popen.returncode`) and said `log`.

    `when_killed` is the advice for one that ran out of memory.
    """
    if code == -signal.SIGKILL:
        return f"was killed; the machine may be out of memory{when_killed}"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"failed: {lines[-1]}" if lines else f"ended with {code} and said nothing"
