"""Evaluation of a classifier over a split: every image once, whatever the batch size and the number of processes."""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.engine.precision import autocast
from services.trainer.engine.ranks import ALONE, Ranks
from tandem.checkpoints.card import Preprocessing
from tandem.data.images import normalise
from tandem.data.splits import ImageSplit

TOP_K = 5

Report = TypeVar("Report")


class Predictions(NamedTuple):
    """What a classifier says of N images, in the order of their split, on the CPU.

    `labels` (N,) int64; `losses` (N,) float32, in nats; `top_classes` (N, k) int64, the most probable first;
    `top_probabilities` (N, k) float32. k is 5, or the number of classes where there are fewer.
    """

    labels: Tensor
    losses: Tensor
    top_classes: Tensor
    top_probabilities: Tensor

    def metrics(self, prefix: str = "val_") -> dict[str, float]:
        """Return loss (mean, in nats), acc1 and acc5 (percent), each with `prefix` before its name."""
        right = (self.top_classes == self.labels[:, None])[:, :TOP_K]
        return {
            f"{prefix}loss": float(self.losses.double().mean()),
            f"{prefix}acc1": 100 * float(right[:, 0].double().mean()),
            f"{prefix}acc5": 100 * float(right.any(1).double().mean()),
        }


@dataclass(frozen=True)
class Evaluator:
    """Runs networks over splits on `device`, `batch_size` images at a time, each process its share of them."""

    preprocessing: Preprocessing
    device: torch.device
    precision: Literal["float32", "bfloat16"]
    batch_size: int
    ranks: Ranks = ALONE

    def predict(
        self, network: nn.Module, split: ImageSplit, top_k: int = TOP_K, mirror: bool = False
    ) -> Generator[int, None, Predictions]:
        """Yield the number of images done by this process after each batch; return the predictions of the whole split.

        `mirror` takes the mean of the probabilities of each image and its mirror image (test-time augmentation). The
        network is left in eval mode. Each process of the group must call this.
        """
        network.eval()
        mine = self.ranks.share(torch.arange(len(split.labels)))
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        # As many times for each process, though the share of some has an image less: they may vote in between.
        for first in range(0, math.ceil(len(split.labels) / self.ranks.size), self.batch_size):
            rows = mine[first : first + self.batch_size]
            if len(rows):
                parts.append(self._predict_batch(network, split, rows, top_k, mirror))
            yield first + len(rows)
        losses, classes, probabilities = (self._whole(column, len(split.labels)) for column in zip(*parts, strict=True))
        return Predictions(split.labels, losses, classes, probabilities)

    # inference_mode must not stay open over a yield: the caller may save or train in between.
    @torch.inference_mode()
    def _predict_batch(
        self, network: nn.Module, split: ImageSplit, rows: Tensor, top_k: int, mirror: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        images = self.to_device(split.eval_batch(rows))
        log_probabilities = self._log_probabilities(network, images)
        if mirror:
            mirrored = self._log_probabilities(network, images.flip(-1))
            log_probabilities = torch.logaddexp(log_probabilities, mirrored) - math.log(2)
        labels = split.labels[rows].to(self.device, non_blocking=True)
        best = log_probabilities.topk(min(top_k, log_probabilities.shape[1]), dim=1)
        losses = F.nll_loss(log_probabilities, labels, reduction="none")
        return losses, best.indices, best.values.exp()

    def _log_probabilities(self, network: nn.Module, images: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            logits: Tensor = network(images)
        return logits.float().log_softmax(1)

    def to_device(self, pixels: Tensor) -> Tensor:
        """Return uint8 pixels (B, 3, H, W) as the normalised float32 batch that the network takes, on the device."""
        images = normalise(pixels.to(self.device, non_blocking=True), self.preprocessing)
        return images.contiguous(memory_format=torch.channels_last)

    def _whole(self, column: tuple[Tensor, ...], total: int) -> Tensor:
        return self.ranks.interleave(torch.cat(column).cpu(), total)


def relayed(
    running: Generator[int, None, Predictions], report: Callable[[], Report]
) -> Generator[Report, None, Predictions]:
    """Run an evaluation, yielding a report after each of its batches; return its predictions."""
    while True:
        try:
            next(running)
        except StopIteration as end:
            predictions: Predictions = end.value
            return predictions
        yield report()


def result_of(running: Generator[int, None, Predictions]) -> Predictions:
    """Run an evaluation to its end, and return its predictions."""
    while True:
        try:
            next(running)
        except StopIteration as end:
            predictions: Predictions = end.value
            return predictions
