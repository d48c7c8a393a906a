"""Ending child processes, and what is said of their end."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.processes import how_it_ended, stop


def start(code: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_what_is_asked_to_end_may_tidy_up(tmp_path: Path) -> None:
    mark = tmp_path / "tidied"
    code = f"import atexit, signal, sys, time; atexit.register(open, {str(mark)!r}, 'w')\n"
    process = start(code + "signal.signal(15, lambda *_: sys.exit(0)); print(flush=True); time.sleep(60)")
    stop(process, 10)
    assert process.returncode == 0
    assert mark.exists()


def test_what_does_not_end_is_killed_with_its_children() -> None:
    child = "import time; time.sleep(60)"
    code = "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); "
    process = start(code + f"subprocess.Popen([sys.executable, '-c', {child!r}]); print(flush=True); time.sleep(60)")
    stop(process, 0.1)
    assert process.returncode == -signal.SIGKILL
    assert not alive_in_session(process.pid)


def alive_in_session(session: int) -> list[str]:
    states = (path.read_text().rsplit(")", 1)[1].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists())
    return [state for state, _, _, of, *_ in states if int(of) == session and state != "Z"]


def test_what_has_ended_is_left_alone() -> None:
    process = start("print(flush=True)")
    process.wait()
    stop(process, 1)
    assert process.returncode == 0
    assert not Path(f"/proc/{process.pid}").exists()


@pytest.mark.parametrize(
    ("code", "log", "said"),
    [
        (-9, "x", "was killed; the machine may be out of memory: lower --batch-size"),
        (-11, "x", "was ended by SIGSEGV"),
        (1, "Traceback\n  ValueError: no\n\n", "failed: ValueError: no"),
        (3, " \n", "ended with 3 and said nothing"),
    ],
)
def test_how_it_ended(code: int, log: str, said: str) -> None:
    assert how_it_ended(code, log, ": lower --batch-size") == said
