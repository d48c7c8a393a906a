"""The training process: `python -m services.trainer.run RUN_DIRECTORY --attempt N`.

It reads job.json, computes, saves, and says how it ended in status.json. It knows no Redis: the supervisor reads its
JSON lines from standard output. SIGTERM asks it to save and stop; it does so after the step in hand. SIGINT (Ctrl-C)
ends the run for good: what is best so far is tested then, if that takes seconds. Under torchrun it is one of several;
the first of them saves and reports.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from services.trainer.assembly import assemble
from services.trainer.distributed import is_lost_contact, join_ranks, leave_ranks
from services.trainer.drive import Stop, drive
from services.trainer.engine.memory import is_out_of_memory
from services.trainer.engine.ranks import ALONE, Ranks
from services.trainer.evaluation import evaluate
from services.trainer.reporter import Events, write_status
from services.trainer.reporter_files import STATUS_FILE
from services.trainer.text_evaluation import evaluate_text
from tandem.errors import TandemError
from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import EvaluationJob, TextEvaluationJob, parse_spec
from tandem.processes import die_with_parent
from tandem.volume import Volume, volume_errors

log = logging.getLogger("tandem.run")


class StopFlag:
    """Set by SIGTERM, and by SIGINT for good; read between steps."""

    def __init__(self) -> None:
        self.is_set = self.is_final = False
        signal.signal(signal.SIGTERM, self._set)
        signal.signal(signal.SIGINT, self._set)

    def _set(self, number: int, _: object) -> None:
        self.is_set = True
        self.is_final = self.is_final or number == signal.SIGINT


def main() -> None:
    """Run one attempt; exit 0 whenever status.json says how it ended (under torchrun 1 if it failed)."""
    arguments = _parse_arguments()
    die_with_parent(arguments.parent)
    events = _take_standard_output()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    stop = StopFlag()
    status = run_attempt(arguments.run, arguments.attempt, events, stop)
    events.write(json.dumps({"type": "ended", "at": time.time(), **status}) + "\n")
    events.flush()
    if "RANK" in os.environ:
        # Not through the interpreter's end: the others are told by torchrun, and a failed group can't be closed.
        os._exit(status["outcome"] in ("failed", "lost"))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process has gone")
    return parser.parse_args()


def _take_standard_output() -> IO[str]:
    """Keep standard output for the events of the first process alone; whatever libraries print goes to the log."""
    is_first = os.environ.get("RANK", "0") == "0"
    target = os.dup(1) if is_first else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    return os.fdopen(target, "w", encoding="utf-8")


def run_attempt(run: Path, attempt: int, events: IO[str], stop: Stop) -> dict[str, object]:
    """Do the job until it is done, stopped or failed; return what status.json says."""
    ranks = ALONE
    try:
        with volume_errors(run):
            spec = parse_spec((run / SPEC_FILE).read_bytes())
            volume = Volume(run.parent.parent)
            if isinstance(spec, EvaluationJob | TextEvaluationJob):
                return _evaluate(spec, run, attempt, volume, events, lambda: stop.is_set)
            ranks = join_ranks(wants_gpu=spec.device != "cpu")
            status = drive(assemble(spec, volume, run.name, ranks), spec, run, attempt, Events(events), stop)
            leave_ranks()
            return status
    except TandemError as error:
        return _failed(run, attempt, str(error), type(error).__name__, ranks)
    except Exception as error:  # whatever it is, the run ends with a line
        log.exception("the attempt failed")
        if ranks.size > 1 and is_lost_contact(error):
            # Another process died, or has said why it failed: no reason of this one's.
            return {"attempt": attempt, "outcome": "lost", "message": str(error)}
        first_line = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no message"
        if is_out_of_memory(error):
            return _failed(run, attempt, f"out of memory ({first_line}); lower --batch-size", "OutOfMemory", ranks)
        message = f"{type(error).__name__}: {first_line} ('tandem runs logs {run.name}' has the traceback)"
        return _failed(run, attempt, message, "Internal", ranks)


def _evaluate(
    spec: EvaluationJob | TextEvaluationJob,
    run: Path,
    attempt: int,
    volume: Volume,
    events: IO[str],
    stop: Callable[[], bool],
) -> dict[str, object]:
    told = Events(events)
    told.emit("started", attempt=attempt)
    if isinstance(spec, TextEvaluationJob):
        metrics = evaluate_text(spec, run, volume, told.emit, stop)
    else:
        metrics = evaluate(spec, run, volume, told.emit, stop)
    if metrics is None:
        return write_status(run, attempt, "stopped", message="stopped before its end")
    return write_status(run, attempt, "succeeded", metrics=metrics)


def _failed(run: Path, attempt: int, message: str, error: str, ranks: Ranks) -> dict[str, object]:
    log.error("failed: %s", message)
    status: dict[str, object] = {"attempt": attempt, "outcome": "failed", "message": message, "error": error}
    try:
        if ranks.size > 1 and (first := _told_by_another(run, attempt)):
            # What ends one process breaks the connections of the others: the first message is the reason.
            return first
        return write_status(run, attempt, "failed", message=message, error=error)
    except OSError:
        # A full volume may have no room for the status either; the event tells the supervisor.
        return status


def _told_by_another(run: Path, attempt: int) -> dict[str, object] | None:
    try:
        status: dict[str, object] = json.loads((run / STATUS_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return status if status["attempt"] == attempt else None


if __name__ == "__main__":
    main()
