"""The training process: `python -m services.trainer.run RUN_DIRECTORY --attempt N`, or `--wait` for its run.

It reads job.json, computes (`services.trainer.computing`), saves, and says how it ended in status.json. It knows no
Redis: the supervisor reads its JSON lines from standard output. SIGTERM asks it to save and stop; it does so after the
step in hand. SIGINT (Ctrl-C) ends the run for good: what is best so far is tested then, if that takes seconds. Under
torchrun it is one of several; the first of them saves and reports.

Here is what comes before torch is imported, which takes seconds: whoever asks it to stop meanwhile must be heard, and
what libraries print must not mix with the events.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import IO

from services.trainer.reporter_files import LOG_FILE
from tandem.processes import die_with_parent, name_process


class StopFlag:
    """Set by SIGTERM, and by SIGINT for good; read between steps."""

    def __init__(self) -> None:
        self.is_set = self.is_final = False
        signal.signal(signal.SIGTERM, self._set)
        # Celery's children ignore it, and what they start would.
        signal.signal(signal.SIGINT, self._set)

    def _set(self, number: int, _: object) -> None:
        self.is_set = True
        self.is_final = self.is_final or number == signal.SIGINT


def main() -> None:
    """Run one attempt; exit 0 whenever status.json says how it ended (under torchrun 1 if it failed)."""
    stop = StopFlag()
    arguments = _parse_arguments()
    die_with_parent(arguments.parent)
    events = _take_standard_output()
    if arguments.wait:
        _wait(events, stop)
    else:
        _compute(arguments.run, arguments.attempt, events, stop)


def _wait(events: IO[str], stop: StopFlag) -> None:
    """Import everything, read the run from standard input, and compute it; end where there comes none.

    It touches no GPU before it knows its run.
    """
    name_process("tandem:spare")
    from services.trainer.computing import preload

    preload()
    name_process("tandem:ready")
    line = sys.stdin.readline()
    if not line:
        return
    job = json.loads(line)
    with open(Path(job["run"]) / LOG_FILE, "ab") as log:
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
    _compute(Path(job["run"]), job["attempt"], events, stop)


def _compute(run: Path, attempt: int, events: IO[str], stop: StopFlag) -> None:
    """Run one attempt in this process, which is the run's from now on."""
    name_process(f"tandem:{run.name[-8:]}")
    from services.trainer.computing import compute

    status = compute(run, attempt, events, stop)
    if "RANK" in os.environ:
        # Not through the interpreter's end: the others are told by torchrun, and a failed group can't be closed.
        os._exit(status["outcome"] in ("failed", "lost"))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process has gone")
    parser.add_argument("--wait", action="store_true", help="import everything, and read the run from standard input")
    arguments = parser.parse_args()
    if not arguments.wait and (arguments.run is None or arguments.attempt is None):
        parser.error("give RUN_DIRECTORY and --attempt, or --wait")
    return arguments


def _take_standard_output() -> IO[str]:
    """Keep standard output for the events of the first process alone; whatever libraries print goes to the log."""
    is_first = os.environ.get("RANK", "0") == "0"
    target = os.dup(1) if is_first else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    return os.fdopen(target, "w", encoding="utf-8")


if __name__ == "__main__":
    main()
