"""What the training process says: JSON lines for the supervisor, status.json for good, curves for TensorBoard."""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from services.trainer.engine.reports import EpochDone, StepDone, Training, check_finite
from services.trainer.reporter_files import STATUS_FILE
from tandem.volume import replace_json

_PROGRESS_INTERVAL_S = 0.5


class Reporter:
    """Turns the reports of a training loop into events, at most two progress events a second."""

    def __init__(
        self, out: IO[str], training: Training, num_epochs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out = out
        self._training = training
        self._num_epochs = num_epochs
        self._clock = clock
        self._started = self._last = clock()
        self._examples = 0
        self._first_step = training.step
        self.rate: float | None = None

    def emit(self, kind: str, **facts: Any) -> None:
        """Write one event."""
        self._out.write(json.dumps({"type": kind, "at": time.time(), **facts}) + "\n")
        self._out.flush()

    def step(self, report: StepDone) -> Mapping[str, float] | None:
        """Count a step; return the running metrics when a progress event was due and has been written."""
        self._examples += report.num_examples
        elapsed = self._clock() - self._last
        if elapsed < _PROGRESS_INTERVAL_S:
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
        self.emit("epoch", epoch=report.epoch, step=report.step, metrics=dict(report.metrics))
        # Evaluation is not training: the rate begins anew after it.
        self._last, self._examples = self._clock(), 0

    def _progress(self, epoch: int, metrics: Mapping[str, float]) -> None:
        num_steps = self._num_epochs * self._training.steps_per_epoch
        done = self._training.step - self._first_step
        pace = (self._clock() - self._started) / done if done else 0.0
        self.emit(
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
    """Write how the attempt ended to status.json and return it; what the supervisor trusts."""
    status = {"attempt": attempt, "outcome": outcome, **facts}
    replace_json(run / STATUS_FILE, status)
    return status


class Curves:
    """TensorBoard logs of a run: the graph once, scalars by epoch, and rates and running loss by step."""

    def __init__(self, run: Path, first_step: int) -> None:
        # Imported here: it takes a second, and only the training process needs it.
        from torch.utils.tensorboard import SummaryWriter

        # Points beyond the checkpoint that is resumed from are drawn anew.
        purge = first_step + 1 if first_step else None
        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=purge, flush_secs=10)

    def graph(self, network: nn.Module, example: Tensor) -> None:
        """Draw the network, traced in eval mode so that dropout leaves no marks."""
        was_training = network.training
        network.eval()
        with torch.no_grad(), warnings.catch_warnings():
            # The tracer is deprecated, and is what TensorBoard's graphs are made with.
            warnings.simplefilter("ignore")
            # Not strict: language models return their state beside the logits.
            self._writer.add_graph(network, example, use_strict_trace=False)
        network.train(was_training)

    def scalars(self, metrics: Mapping[str, float], step: int, prefix: str = "") -> None:
        """Add one point to the curve of each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(prefix + name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()
