"""Evaluation of a classifier over a split: every image once, whatever the batch size and the number of processes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.engine.precision import autocast
from services.trainer.engine.ranks import ALONE, Ranks
from tandem.checkpoints.card import Preprocessing
from tandem.comparison.classification import accuracy_at, mean_loss
from tandem.data.images import normalise
from tandem.data.splits import ImageSplit

TOP_K = 5


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
        top, labels = self.top_classes.numpy(), self.labels.numpy()
        return {
            f"{prefix}loss": mean_loss(self.losses.numpy()),
            f"{prefix}acc1": accuracy_at(top, labels, 1),
            f"{prefix}acc5": accuracy_at(top, labels, 5),
        }


@dataclass(frozen=True)
class Evaluator:
    """Runs networks over splits on `device`, `batch_size` images at a time, each process its share of them."""

    preprocessing: Preprocessing
    device: torch.device
    precision: Literal["float32", "bfloat16"]
    batch_size: int
    ranks: Ranks = ALONE

    def predict(self, network: nn.Module, split: ImageSplit, top_k: int = TOP_K, mirror: bool = False) -> "Evaluation":
        """Return the evaluation of `network` over `split`, which computes as it is iterated.

        `mirror` takes the mean of the probabilities of each image and its mirror image (test-time augmentation). The
        network is left in eval mode. Each process of the group must call this.
        """
        return Evaluation(self, network, split, top_k, mirror)

    # inference_mode must not stay open over a yield: the caller may save or train in between.
    @torch.inference_mode()
    def predict_batch(
        self, network: nn.Module, split: ImageSplit, rows: Tensor, top_k: int, mirror: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses (b,), the most probable classes (b, k) and their probabilities (b, k) of `rows` (b,)."""
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


@dataclass
class Evaluation:
    """One pass over a split: iterate it, and it has `predictions`.

    Each process iterates as many times, though the share of some has an image less: they may vote in between.
    """

    evaluator: Evaluator
    network: nn.Module
    split: ImageSplit
    top_k: int
    mirror: bool

    def __iter__(self) -> Iterator[int]:
        """Compute batch after batch, yielding the number of images that this process has done."""
        self.network.eval()
        ranks, size, total = self.evaluator.ranks, self.evaluator.batch_size, len(self.split.labels)
        mine = ranks.share(torch.arange(total))
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for first in range(0, math.ceil(total / ranks.size), size):
            rows = mine[first : first + size]
            if len(rows):
                parts.append(self.evaluator.predict_batch(self.network, self.split, rows, self.top_k, self.mirror))
            yield first + len(rows)
        whole = (ranks.interleave(torch.cat(column).cpu(), total) for column in zip(*parts, strict=True))
        self._predictions = Predictions(self.split.labels, *whole)

    @property
    def predictions(self) -> Predictions:
        """The predictions of the whole split; what is left to compute is computed first."""
        if not hasattr(self, "_predictions"):
            for _ in self:
                pass
        return self._predictions
