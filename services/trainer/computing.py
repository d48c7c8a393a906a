"""What the training process does once torch is imported: one attempt, from job.json to status.json."""

import json
import logging
import os
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
from services.trainer.engine.uncompiled import leave_compiler_out
from services.trainer.evaluation import evaluate
from services.trainer.promotion import Promoter
from services.trainer.reporter import Events, write_status
from services.trainer.reporter_files import STATUS_FILE
from services.trainer.text_evaluation import evaluate_text
from tandem.errors import Superseded, TandemError, VolumeUnavailable
from tandem.jobs.fence import Fence
from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import EvaluationJob, PromotionJob, TextEvaluationJob, parse_spec
from tandem.settings import Settings
from tandem.volume import Volume, volume_errors

log = logging.getLogger("tandem.run")


def compute(run: Path, attempt: int, events: IO[str], stop: Stop) -> dict[str, object]:
    """Run one attempt and tell its end; return what status.json says."""
    leave_compiler_out()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if stop.is_set and "RANK" not in os.environ:
        # Nothing is lost: what there is was saved by an attempt before.
        status: dict[str, object] = write_status(run, attempt, "stopped", message="stopped before its first step")
    else:
        status = run_attempt(run, attempt, events, stop)
    events.write(json.dumps({"type": "ended", "at": time.time(), **status}) + "\n")
    events.flush()
    return status


def preload() -> None:
    """Import what torch and TensorBoard import when they are first used, while nobody waits for it."""
    import torch.utils.tensorboard
    from torch.optim import AdamW

    leave_compiler_out()
    AdamW([torch.zeros(1, requires_grad=True)], fused=False)


def run_attempt(run: Path, attempt: int, events: IO[str], stop: Stop) -> dict[str, object]:
    """Do the job until it is done, stopped or failed; return what status.json says."""
    ranks = ALONE
    try:
        with volume_errors(run):
            spec = parse_spec((run / SPEC_FILE).read_bytes())
            volume = Volume(run.parent.parent, Settings.from_environment().checkpoint_store)
            if isinstance(spec, EvaluationJob | TextEvaluationJob | PromotionJob):
                return _evaluate(spec, run, attempt, volume, events, lambda: stop.is_set)
            ranks = join_ranks(wants_gpu=spec.device != "cpu")
            status = drive(assemble(spec, volume, run.name, ranks), spec, run, attempt, Events(events), stop)
            leave_ranks()
            return status
    except Superseded as error:
        log.warning("stopped: %s", error)
        return {"attempt": attempt, "outcome": "superseded", "message": str(error)}
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
    spec: EvaluationJob | TextEvaluationJob | PromotionJob,
    run: Path,
    attempt: int,
    volume: Volume,
    events: IO[str],
    stop: Callable[[], bool],
) -> dict[str, object]:
    told = Events(events)
    fence = Fence(run)

    def report(kind: str, **facts: object) -> None:
        fence.check(attempt)
        told.emit(kind, **facts)

    told.emit("started", attempt=attempt)
    message = ""
    if isinstance(spec, PromotionJob):
        found = Promoter(spec, run, volume, report, stop, lambda: fence.held(attempt)).promote()
        metrics, message = (found.metrics, found.sentence) if found is not None else (None, "")
    elif isinstance(spec, TextEvaluationJob):
        metrics = evaluate_text(spec, run, volume, report, stop, lambda: fence.held(attempt))
    else:
        metrics = evaluate(spec, run, volume, report, stop, lambda: fence.held(attempt))
    if metrics is None:
        return write_status(run, attempt, "stopped", message="stopped before its end")
    return write_status(run, attempt, "succeeded", metrics=metrics, message=message)


def _failed(run: Path, attempt: int, message: str, error: str, ranks: Ranks) -> dict[str, object]:
    log.error("failed: %s", message)
    status: dict[str, object] = {"attempt": attempt, "outcome": "failed", "message": message, "error": error}
    try:
        if ranks.size > 1 and (first := _told_by_another(run, attempt)):
            # What ends one process breaks the connections of the others: the first message is the reason.
            return first
        return write_status(run, attempt, "failed", message=message, error=error)
    except (VolumeUnavailable, Superseded):
        # A full volume may have no room for the status either; the event tells the supervisor.
        return status


def _told_by_another(run: Path, attempt: int) -> dict[str, object] | None:
    try:
        status: dict[str, object] = json.loads((run / STATUS_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return status if status["attempt"] == attempt else None
