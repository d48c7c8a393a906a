"""What a training loop yields, and the little that both loops share."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tandem.errors import NonFiniteLoss


@dataclass(frozen=True)
class StepDone:
    """One optimizer update is done; `num_examples` images or words were in it. Snapshots may be taken now."""

    epoch: int
    step: int
    num_examples: int


@dataclass(frozen=True)
class EvaluationStep:
    """A part of an evaluation is done. Snapshots may be taken now; the evaluation is then done anew on resume."""

    epoch: int
    step: int


@dataclass(frozen=True)
class EpochDone:
    """An epoch is done and evaluated; `improved` says that it is the best so far. Snapshots may be taken now."""

    epoch: int
    step: int
    metrics: Mapping[str, float]
    improved: bool


Report = StepDone | EvaluationStep | EpochDone


class Training(Protocol):
    """A training loop, at some step."""

    network: nn.Module
    step: int
    steps_per_epoch: int
    finished_epochs: int

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What updates `network`."""
        ...

    @property
    def served_network(self) -> nn.Module:
        """The network that is evaluated and saved: `network`, or an average that follows it."""
        ...

    def fit(self) -> Iterator[Report]:
        """Train from the current step to the end."""
        ...

    def running_metrics(self) -> dict[str, float]:
        """Return the metrics of the epoch so far; costs a device synchronisation."""
        ...

    def forget_best(self) -> None:
        """Let the next epoch be the best so far."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """Return everything besides the weights that an exact continuation needs."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `snapshot` returned; the weights have been loaded already."""
        ...


def check_finite(loss: float, epoch: int, step: int) -> None:
    """Raise NonFiniteLoss if `loss` is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"the loss became {loss} in epoch {epoch}, by step {step}; lower --learning-rate "
            "(the last good checkpoint is kept)"
        )
