"""The training process: `python -m services.trainer.run RUN_DIRECTORY --attempt N`.

It reads job.json, computes, saves, and says how it ended in status.json. It knows no Redis: the supervisor reads its
JSON lines from standard output. SIGTERM asks it to save and stop; it does so after the step in hand.
"""

import argparse
import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from services.trainer.assembly import Job, assemble
from services.trainer.engine.reports import EpochDone, StepDone
from services.trainer.reporter import Curves, Reporter, finite_metrics, write_status
from services.trainer.saver import Saver, load_best
from tandem.errors import Conflict, TandemError
from tandem.jobs.runs import RECORD_FILE, SPEC_FILE
from tandem.jobs.spec import JobSpec, parse_spec
from tandem.volume import Volume, volume_errors

log = logging.getLogger("tandem.run")


class StopFlag:
    """Set by SIGTERM; read between steps."""

    def __init__(self) -> None:
        self.is_set = False
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, *_: object) -> None:
        self.is_set = True


def main() -> None:
    """Run one attempt; exit 0 whenever status.json says how it ended."""
    arguments = _parse_arguments()
    die_with_parent(arguments.parent)
    events = _take_standard_output()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    stop = StopFlag()
    status = run_attempt(arguments.run, arguments.attempt, events, lambda: stop.is_set)
    events.write(json.dumps({"type": "ended", "at": time.time(), **status}) + "\n")
    events.flush()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process has gone")
    return parser.parse_args()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, and check that the parent still lives."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent process has gone")


def _take_standard_output() -> IO[str]:
    """Keep standard output for events alone; whatever libraries print goes to the log."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


def run_attempt(run: Path, attempt: int, events: IO[str], stop: Callable[[], bool]) -> dict[str, object]:
    """Train until done, stopped or failed; return what status.json says."""
    try:
        with volume_errors(run):
            spec = parse_spec((run / SPEC_FILE).read_bytes())
            return _train(spec, run, attempt, events, stop)
    except TandemError as error:
        return _failed(run, attempt, str(error), type(error).__name__)
    except (torch.OutOfMemoryError, MemoryError) as error:
        log.exception("out of memory")
        message = f"out of memory ({str(error).splitlines()[0][:120]}); lower --batch-size"
        return _failed(run, attempt, message, "OutOfMemory")
    except Exception as error:  # whatever it is, the run ends with a line
        log.exception("the attempt failed")
        message = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
        return _failed(run, attempt, f"{message} ('tandem runs logs {run.name}' has the traceback)", "Internal")


def _failed(run: Path, attempt: int, message: str, error: str) -> dict[str, object]:
    log.error("failed: %s", message)
    try:
        return write_status(run, attempt, "failed", message=message, error=error)
    except OSError:
        # A full volume may have no room for the status either; the event tells the supervisor.
        return {"attempt": attempt, "outcome": "failed", "message": message, "error": error}


def _train(spec: JobSpec, run: Path, attempt: int, events: IO[str], stop: Callable[[], bool]) -> dict[str, object]:
    volume = Volume(run.parent.parent)
    job = assemble(spec, volume, run.name)
    saver = Saver(run, job.make_card, job.vocabulary, lambda: _check_fence(run, attempt))
    if saver.resume(job.training):
        log.info("attempt %d resumes at step %d", attempt, job.training.step)
    reporter = Reporter(events, job.training, spec.epochs)
    curves = Curves(run, job.training.step)
    try:
        if job.training.step == 0:
            curves.graph(job.training.network, job.example)
        reporter.emit("started", attempt=attempt, step=job.training.step)
        if not fit(job, spec, saver, reporter, curves, stop):
            return write_status(run, attempt, "stopped", message=f"stopped at step {job.training.step}")
        return _finish(job, run, attempt, curves, spec.epochs)
    finally:
        curves.close()


def fit(job: Job, spec: JobSpec, saver: Saver, reporter: Reporter, curves: Curves, stop: Callable[[], bool]) -> bool:
    """Drive the loop and do its input and output; False if it was stopped (a checkpoint is saved then)."""
    training = job.training
    saved_at = epoch_began = time.monotonic()
    for report in training.fit():
        if isinstance(report, EpochDone):
            seconds = time.monotonic() - epoch_began
            log.info("epoch %d: %s", report.epoch, _readable(dict(report.metrics)))
            checkpoint = saver.save(training, report.metrics, is_best=report.improved)
            reporter.epoch(report)
            reporter.emit("checkpoint", step=report.step, checkpoint=checkpoint.name)
            curves.scalars({**report.metrics, "epoch_time_s": seconds}, report.epoch)
            saved_at = epoch_began = time.monotonic()
        elif isinstance(report, StepDone) and (metrics := reporter.step(report)) is not None:
            curves.scalars({**metrics, f"{job.unit}_per_s": reporter.rate or 0.0}, report.step, prefix="step/")
        is_last = training.finished_epochs == spec.epochs
        if stop() and not is_last:
            if not isinstance(report, EpochDone):
                saver.save(training, finite_metrics(training, report.epoch))
            log.info("stopped at step %d, as asked", training.step)
            return False
        if time.monotonic() - saved_at > spec.checkpoint_every_s and isinstance(report, StepDone):
            checkpoint = saver.save(training, finite_metrics(training, report.epoch))
            reporter.emit("checkpoint", step=training.step, checkpoint=checkpoint.name)
            saved_at = time.monotonic()
    return True


def _finish(job: Job, run: Path, attempt: int, curves: Curves, num_epochs: int) -> dict[str, object]:
    checkpoint = load_best(run, job.training.network)
    card = json.loads((checkpoint / "model.json").read_bytes())
    final = job.final_metrics()
    curves.scalars(final, num_epochs)
    metrics = {**card["metrics"], **final}
    log.info("finished; the best checkpoint is %s: %s", checkpoint.name, _readable(metrics))
    return write_status(run, attempt, "succeeded", checkpoint=checkpoint.name, metrics=metrics)


def _check_fence(run: Path, attempt: int) -> None:
    """Raise Conflict if the record says that a later attempt has begun: this one may write nothing more."""
    try:
        current = json.loads((run / RECORD_FILE).read_bytes())["attempt"]
    except FileNotFoundError:
        return
    # Not "another": an older mirror may come late.
    if current > attempt:
        raise Conflict(f"attempt {current} has begun; attempt {attempt} stops")


def _readable(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))


if __name__ == "__main__":
    main()
