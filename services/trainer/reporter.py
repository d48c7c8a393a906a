"""What the training process says: JSON lines for the supervisor, and status.json for good."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from services.trainer.engine.reports import EpochDone, StepDone, Training, check_finite
from services.trainer.reporter_files import STATUS_FILE
from tandem.jobs.fence import Fence
from tandem.volume import replace_json

_PROGRESS_INTERVAL_S = 0.5


class Events:
    """Writes events, a JSON document on each line."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def emit(self, kind: str, **facts: Any) -> None:
        """Write one event."""
        self._out.write(json.dumps({"type": kind, "at": time.time(), **facts}) + "\n")
        self._out.flush()


class Reporter:
    """Turns the reports of a training loop into events, at most two progress events a second after the first."""

    def __init__(
        self, events: Events, training: Training, num_epochs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._events = events
        self._training = training
        self._num_epochs = num_epochs
        self._clock = clock
        self._started = self._last = clock()
        self._examples = 0
        self._first_step = training.step
        self.rate: float | None = None

    def step(self, report: StepDone) -> Mapping[str, float] | None:
        """Count a step; return the running metrics when a progress event was due and has been written."""
        self._examples += report.num_examples
        if report.step == self._first_step + 1:
            # At once, since somebody may be waiting for it; how fast it goes is not known yet.
            self._progress(report.epoch, finite_metrics(self._training, report.epoch))
        elapsed = self._clock() - self._last
        # Evaluation comes next, and the count begins anew: a short epoch would never be measured.
        is_last_chance = self.rate is None and report.step % self._training.steps_per_epoch == 0
        if elapsed < _PROGRESS_INTERVAL_S and not is_last_chance:
            return None
        metrics = finite_metrics(self._training, report.epoch)
        # Reading the metrics waits for the device, so only now is the time that of the work counted.
        now = self._clock()
        rate = self._examples / (now - self._last)
        self.rate = rate if self.rate is None else 0.7 * self.rate + 0.3 * rate
        self._last, self._examples = now, 0
        self._progress(report.epoch, metrics)
        return metrics

    def epoch(self, report: EpochDone) -> None:
        """Write the end of an epoch."""
        self._progress(report.epoch, report.metrics)
        self._events.emit("epoch", epoch=report.epoch, step=report.step, metrics=dict(report.metrics))
        # Evaluation is not training: the rate begins anew after it.
        self._last, self._examples = self._clock(), 0

    def _progress(self, epoch: int, metrics: Mapping[str, float]) -> None:
        num_steps = self._num_epochs * self._training.steps_per_epoch
        done = self._training.step - self._first_step
        pace = (self._clock() - self._started) / done if done else 0.0
        self._events.emit(
            "progress",
            epoch=epoch,
            num_epochs=self._num_epochs,
            step=self._training.step,
            num_steps=num_steps,
            rate=self.rate,
            time_left_s=pace * (num_steps - self._training.step),
            metrics=dict(metrics),
        )


def finite_metrics(training: Training, epoch: int) -> dict[str, float]:
    """Return the running metrics; raise NonFiniteLoss before anything that is no number is reported or saved."""
    metrics = training.running_metrics()
    check_finite(metrics["train_loss"], epoch, training.step)
    return metrics


def write_status(run: Path, attempt: int, outcome: str, **facts: Any) -> dict[str, Any]:
    """Write how the attempt ended to status.json and return it; what the supervisor trusts.

    Raises Superseded where a later attempt has begun.
    """
    status = {"attempt": attempt, "outcome": outcome, **facts}
    with Fence(run).held(attempt):
        replace_json(run / STATUS_FILE, status)
    return status
