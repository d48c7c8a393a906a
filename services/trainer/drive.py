"""From the reports of a training loop to files: checkpoints, events, curves, and the end of the attempt."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from services.trainer.curves import Curves
from services.trainer.engine.reports import EpochDone, Report, StepDone
from services.trainer.job import Job
from services.trainer.reporter import Events, Reporter, finite_metrics, write_status
from services.trainer.saver import Saver, load_best
from tandem.errors import Conflict
from tandem.jobs.runs import RECORD_FILE
from tandem.jobs.spec import TrainingSpec

log = logging.getLogger("tandem.run")

# Several processes agree each so many steps whether to stop or to save, since each agreement costs them a wait.
_STEPS_BETWEEN_VOTES = 4


def drive(
    job: Job, spec: TrainingSpec, run: Path, attempt: int, events: Events, stop: Callable[[], bool]
) -> dict[str, object]:
    """Train `job` to its end, from its newest checkpoint; return what status.json says."""
    saver = Saver(run, job.make_card, job.files, lambda: _check_fence(run, attempt), job.ranks.is_first)
    if saver.resume(job.training, job.resume_from):
        log.info("attempt %d resumes at step %d", attempt, job.training.step)
    curves = Curves(run, job.training.step) if job.ranks.is_first else None
    driver = _Driver(job, spec, saver, events, curves, stop)
    try:
        if job.training.step == 0 and curves:
            curves.graph(job.training.network, job.example)
        events.emit("started", attempt=attempt, step=job.training.step)
        if not driver.fit():
            return _ended(job, run, attempt, "stopped", message=f"stopped at step {job.training.step}")
        return driver.finish(run, attempt)
    finally:
        if curves:
            curves.close()


class _Driver:
    """Drives the loop and does its input and output."""

    def __init__(
        self,
        job: Job,
        spec: TrainingSpec,
        saver: Saver,
        events: Events,
        curves: Curves | None,
        stop: Callable[[], bool],
    ) -> None:
        self._job, self._spec, self._saver, self._events, self._curves = job, spec, saver, events, curves
        self._reporter = Reporter(events, job.training, spec.epochs)
        self._stop = stop
        self._began = self._epoch_began = self._saved_at = time.monotonic()

    def fit(self) -> bool:
        """Train to the end; False if it was stopped (a checkpoint is saved then)."""
        training = self._job.training
        for report in training.fit():
            self._take(report)
            is_last = training.finished_epochs == self._spec.epochs
            stop, save = self._decide(report)
            if stop and not is_last:
                if not isinstance(report, EpochDone):
                    self._save_within(report.epoch)
                log.info("stopped at step %d, as asked", training.step)
                return False
            if save:
                self._save_within(report.epoch)
        return True

    def _take(self, report: Report) -> None:
        if isinstance(report, EpochDone):
            self._take_epoch(report)
        elif isinstance(report, StepDone) and (metrics := self._reporter.step(report)) is not None:
            self._draw({**metrics, **self._rate()}, report.step, prefix="step/")

    def _take_epoch(self, report: EpochDone) -> None:
        now = time.monotonic()
        log.info("epoch %d: %s", report.epoch, readable(dict(report.metrics)))
        times = {"epoch_time_s": now - self._epoch_began, "total_time_s": now - self._began}
        self._draw({**report.metrics, **self._rate(), **times}, report.epoch)
        checkpoint = self._saver.save(self._job.training, report.metrics, is_best=report.improved)
        self._reporter.epoch(report)
        self._tell(checkpoint)
        self._epoch_began = time.monotonic()

    def _rate(self) -> dict[str, float]:
        rate = self._reporter.rate
        return {} if rate is None else {f"{self._job.unit}_per_s": rate}

    def _decide(self, report: Report) -> tuple[bool, bool]:
        """Return whether to stop, and whether to save; several processes decide together, after the same steps."""
        is_due = time.monotonic() - self._saved_at > self._spec.checkpoint_every_s
        is_step = isinstance(report, StepDone)
        if self._job.ranks.size == 1:
            return self._stop(), is_step and is_due
        if is_step and report.step % _STEPS_BETWEEN_VOTES == 0:
            stop, save = self._job.ranks.any(self._stop(), is_due)
            return stop, save
        return False, False

    def _save_within(self, epoch: int) -> None:
        metrics = finite_metrics(self._job.training, epoch)
        self._tell(self._saver.save(self._job.training, metrics))

    def _tell(self, checkpoint: Path) -> None:
        self._events.emit("checkpoint", step=self._job.training.step, checkpoint=checkpoint.name)
        self._saved_at = time.monotonic()

    def _draw(self, metrics: Mapping[str, float], step: int, prefix: str = "") -> None:
        if self._curves:
            self._curves.scalars(metrics, step, prefix)

    def finish(self, run: Path, attempt: int) -> dict[str, object]:
        """Measure the best network once more, draw what it got wrong, and end."""
        checkpoint = load_best(run, self._job.training.served_network)
        card = json.loads((checkpoint / "model.json").read_bytes())
        final = self._job.finish(self._curves)
        metrics = {**card["metrics"], **final}
        self._draw(final, self._spec.epochs)
        if self._curves:
            self._curves.hyper_parameters(self._spec, metrics)
        log.info("finished; the best checkpoint is %s: %s", checkpoint.name, readable(metrics))
        return _ended(self._job, run, attempt, "succeeded", checkpoint=checkpoint.name, metrics=metrics)


def _ended(job: Job, run: Path, attempt: int, outcome: str, **facts: object) -> dict[str, object]:
    if job.ranks.is_first:
        return write_status(run, attempt, outcome, **facts)
    return {"attempt": attempt, "outcome": outcome, **facts}


def _check_fence(run: Path, attempt: int) -> None:
    """Raise Conflict if the record says that a later attempt has begun: this one may write nothing more."""
    try:
        current = json.loads((run / RECORD_FILE).read_bytes())["attempt"]
    except FileNotFoundError:
        return
    # Not "another": an older mirror may come late.
    if current > attempt:
        raise Conflict(f"attempt {current} has begun; attempt {attempt} stops")


def readable(metrics: dict[str, float]) -> str:
    """Return metrics for the log."""
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))
