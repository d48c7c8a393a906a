"""From the reports of a training loop to files: checkpoints, events, curves, and the end of the attempt."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

from services.trainer.curves import Curves
from services.trainer.engine.reports import EpochDone, Report, StepDone
from services.trainer.job import Job
from services.trainer.reporter import Events, Reporter, finite_metrics, write_status
from services.trainer.saver import Saver
from tandem.checkpoints.best import best_checkpoint
from tandem.checkpoints.files import step_of
from tandem.checkpoints.retention import Keep
from tandem.errors import TandemError
from tandem.jobs.fence import Fence
from tandem.jobs.spec import TrainingSpec

log = logging.getLogger("tandem.run")

# Several processes agree each so many steps (or batches of an evaluation) whether to stop or to save, since each
# agreement costs them a wait.
_REPORTS_BETWEEN_VOTES = 4
# A cancel is to take seconds; the checkpoint is saved by then.
_TEST_S = 20.0


class Stop(Protocol):
    """Whether somebody has asked for the end, and whether it was a person: then the run ends for good."""

    @property
    def is_set(self) -> bool:
        """True once the end has been asked for."""
        ...

    @property
    def is_final(self) -> bool:
        """True where the run is not to be continued."""
        ...


def drive(job: Job, spec: TrainingSpec, run: Path, attempt: int, events: Events, stop: Stop) -> dict[str, object]:
    """Train `job` to its end, from its newest checkpoint; return what status.json says."""
    fence = Fence(run)
    keep = Keep(spec.keep_last, spec.keep_every)
    saver = Saver(run, job.make_card, job.files, lambda: fence.held(attempt), job.ranks.is_first, keep)
    saver.begin()
    job.ranks.wait()
    card = saver.resume(job.training, job.resume_from)
    if job.training.finished_epochs < spec.epochs:
        saver.check_room(job.training)
    if card is not None:
        log.info("attempt %d resumes at step %d", attempt, job.training.step)
    spent_s = card.metrics.get("total_time_s", 0.0) if card is not None and card.run_id == run.name else 0.0
    with Curves(run, job.training.step) if job.ranks.is_first else nullcontext() as curves:
        driver = _Driver(job, spec, saver, events, curves, stop, spent_s, lambda: fence.check(attempt))
        if curves and (card is None or card.run_id != run.name):
            curves.graph(job.training.network, job.example)
        events.emit("started", attempt=attempt, step=job.training.step)
        if not driver.fit():
            said, metrics = driver.tested() if stop.is_final else ("", {})
            message = f"stopped at step {job.training.step}{said}"
            return _ended(job, run, attempt, "stopped", message=message, metrics=metrics)
        return driver.finish(run, attempt)


class _Driver:
    """Drives the loop and does its input and output."""

    def __init__(
        self,
        job: Job,
        spec: TrainingSpec,
        saver: Saver,
        events: Events,
        curves: Curves | None,
        stop: Stop,
        spent_s: float,
        check_fence: Callable[[], None],
    ) -> None:
        self._check_fence = check_fence
        self._job, self._spec, self._saver, self._events, self._curves = job, spec, saver, events, curves
        self._reporter = Reporter(events, job.training, spec.epochs)
        self._stop = stop
        self._num_reports = 0
        self._saved_at = time.monotonic()
        # As if the attempts before had come just before this one.
        self._began = self._saved_at - spent_s
        # Of an epoch that an earlier attempt began, nobody knows how long it takes.
        begins_epoch = job.training.step % job.training.steps_per_epoch == 0
        self._epoch_began = self._saved_at if begins_epoch else None

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
        metrics = {**report.metrics, "total_time_s": now - self._began}
        lasted = {} if self._epoch_began is None else {"epoch_time_s": now - self._epoch_began}
        # Drawn first: killed in between, the epoch is drawn again, at the same place with the same values.
        self._draw({**metrics, **self._rate(), **lasted}, report.epoch)
        saved = self._save(metrics, is_best=report.improved)
        self._reporter.epoch(report)
        self._tell(saved)
        if self._curves and self._job.sample:
            self._draw_sample(self._job.sample, self._curves, report.epoch)
        self._epoch_began = time.monotonic()

    def _draw_sample(self, sample: Callable[[], str], curves: Curves, epoch: int) -> None:
        try:
            curves.text("sample", sample(), epoch)
        except TandemError as error:
            # A network may lose itself in its own words; the epoch is a good one all the same.
            log.warning("no sample of text: %s", error)

    def _rate(self) -> dict[str, float]:
        rate = self._reporter.rate
        return {} if rate is None else {f"{self._job.unit}_per_s": rate}

    def _decide(self, report: Report) -> tuple[bool, bool]:
        """Return whether to stop, and whether to save; several processes decide together, after the same reports."""
        is_due = isinstance(report, StepDone) and time.monotonic() - self._saved_at > self._spec.checkpoint_every_s
        self._num_reports += 1
        if self._job.ranks.size > 1 and self._num_reports % _REPORTS_BETWEEN_VOTES:
            return False, False
        stop, save = self._job.ranks.any(self._stop.is_set, is_due)
        return stop, save

    def _save_within(self, epoch: int) -> None:
        metrics = {**finite_metrics(self._job.training, epoch), "total_time_s": time.monotonic() - self._began}
        self._tell(self._save(metrics))

    def _save(self, metrics: Mapping[str, float], is_best: bool = False) -> dict[str, object]:
        """Save a checkpoint; return what its event says: its name, its size, and how long it held up the training."""
        began = time.monotonic()
        checkpoint = self._saver.save(self._job.training, metrics, is_best)
        seconds = time.monotonic() - began
        # Only the first of several processes writes it; it may not be there yet for the others, whom nobody hears.
        num_bytes = _size(checkpoint) if self._job.ranks.is_first else 0
        return {"checkpoint": checkpoint.name, "seconds": seconds, "num_bytes": num_bytes}

    def _tell(self, saved: Mapping[str, object]) -> None:
        self._events.emit("checkpoint", step=self._job.training.step, **saved)
        self._saved_at = time.monotonic()

    def _draw(self, metrics: Mapping[str, float], step: int, prefix: str = "") -> None:
        if self._curves:
            self._curves.scalars(metrics, step, prefix)

    def tested(self) -> tuple[str, dict[str, float]]:
        """Measure the best network so far on the test split, if that takes seconds.

        Returns the end of a sentence, and the metrics, none if it was not measured.
        """
        test, network = self._job.test_within, self._job.training.served_network
        if test is None or self._job.ranks.size > 1 or best_checkpoint(self._saver.run) is None:
            return "", {}
        checkpoint, _ = self._saver.load_best(network)
        metrics = test(_TEST_S)
        if metrics is None:
            later = f"'tandem evaluate run:{self._saver.run.name}/{step_of(checkpoint)} --data {self._spec.dataset}'"
            return f"; testing the best checkpoint takes more than {_TEST_S:.0f} s: {later} does it", {}
        log.info("the best checkpoint is %s: %s", checkpoint.name, readable(metrics))
        if self._curves:
            self._curves.hyper_parameters(self._spec, metrics)
        return f"; the best checkpoint, {checkpoint.name}, has {readable(metrics)}", metrics

    def finish(self, run: Path, attempt: int) -> dict[str, object]:
        """Measure the best network once more, draw what it got wrong, and end."""
        # The first process has just written what the others are about to read.
        self._job.ranks.wait()
        checkpoint, card = self._saver.load_best(self._job.training.served_network)
        final = self._job.finish(self._curves)
        # Of the best epoch, but for the time: that is of them all.
        metrics = {**card.metrics, **final, "total_time_s": time.monotonic() - self._began}
        self._draw(final, self._spec.epochs)
        if self._curves:
            self._curves.hyper_parameters(self._spec, metrics)
        log.info("finished; the best checkpoint is %s: %s", checkpoint.name, readable(metrics))
        return _ended(self._job, run, attempt, "succeeded", checkpoint=checkpoint.name, metrics=metrics)


def _ended(job: Job, run: Path, attempt: int, outcome: str, **facts: object) -> dict[str, object]:
    if job.ranks.is_first:
        return write_status(run, attempt, outcome, **facts)
    return {"attempt": attempt, "outcome": outcome, **facts}


def _size(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.iterdir())


def readable(metrics: dict[str, float]) -> str:
    """Return metrics for the log."""
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))
