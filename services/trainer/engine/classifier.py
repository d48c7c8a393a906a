"""Training a classifier: SGD with Nesterov momentum over augmented batches, and evaluation over the val split."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.engine.optimizer_state import decayed_groups, load_optimizer_tensors, optimizer_tensors
from services.trainer.engine.prefetch import prefetched
from services.trainer.engine.reports import EpochDone, EvaluationStep, Report, StepDone, check_finite
from services.trainer.engine.schedule import learning_rate_at
from tandem.checkpoints.card import Preprocessing
from tandem.data.images import normalise
from tandem.data.randomness import derive_seed, generator
from tandem.data.splits import ImageSplit
from tandem.errors import TrainingFailed
from tandem.jobs.spec import ClassifierJob

# Without gradients an evaluation batch takes less memory than a training batch of half its size.
_EVAL_BATCH_FACTOR = 2


class ClassifierTraining:
    """The state of a training run between two steps, and the loop that moves it on.

    The order of images and their augmentation are functions of (seed, epoch, step), and so is dropout; hence a run
    that goes on from a snapshot computes what it would have computed.
    """

    def __init__(
        self,
        spec: ClassifierJob,
        network: nn.Module,
        train: ImageSplit,
        val: ImageSplit,
        preprocessing: Preprocessing,
        device: torch.device,
    ) -> None:
        if len(train.labels) < 2 or len(val.labels) < 1:
            raise TrainingFailed(
                f"{len(train.labels)} train and {len(val.labels)} val images; at least 2 and 1 are needed"
            )
        self.spec = spec
        self.device = device
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            decayed_groups(network, spec.weight_decay),
            lr=spec.learning_rate,
            momentum=spec.momentum,
            nesterov=spec.momentum > 0,
        )
        self.step = 0
        self.finished_epochs = 0
        self._train, self._val, self._preprocessing = train, val, preprocessing
        self._batch_size = min(spec.batch_size, len(train.labels))
        # A last batch of one image would have no variance for a batch norm to divide by: it is left out.
        whole, rest = divmod(len(train.labels), self._batch_size)
        self.steps_per_epoch = whole + (rest > 1)
        self._best_acc1 = -1.0
        self._sums = torch.zeros(4, device=device, dtype=torch.float64)

    def fit(self) -> Iterator[Report]:
        """Yield a report after each update, each part of an evaluation, and each epoch."""
        while self.finished_epochs < self.spec.epochs:
            yield from self._train_epoch(self.finished_epochs)
            metrics = self.running_metrics()
            check_finite(metrics["train_loss"], self.finished_epochs + 1, self.step)
            yield from self._evaluate(metrics)
            check_finite(metrics["val_loss"], self.finished_epochs + 1, self.step)
            improved = metrics["val_acc1"] > self._best_acc1
            self._best_acc1 = max(self._best_acc1, metrics["val_acc1"])
            metrics["val_best_acc1"] = self._best_acc1
            self.finished_epochs += 1
            self._sums.zero_()
            yield EpochDone(self.finished_epochs, self.step, metrics, improved)

    def _train_epoch(self, epoch: int) -> Iterator[Report]:
        order = torch.randperm(len(self._train.labels), generator=generator(self.spec.seed, "order", epoch))
        first_step = epoch * self.steps_per_epoch
        self.network.train()
        steps = range(self.step, first_step + self.steps_per_epoch)
        for pixels, labels in prefetched(steps, lambda step: self._batch(order, epoch, step, step - first_step)):
            self._update(pixels, labels)
            yield StepDone(epoch + 1, self.step, len(labels))

    def _batch(self, order: Tensor, epoch: int, step: int, number: int) -> tuple[Tensor, Tensor]:
        rows = order[number * self._batch_size : (number + 1) * self._batch_size]
        randomness = generator(self.spec.seed, "augment", epoch, step)
        pixels = self._train.train_batch(rows, randomness, self.spec.crop, self.spec.flip)
        return pixels, self._train.labels[rows]

    def _update(self, pixels: Tensor, labels: Tensor) -> None:
        torch.manual_seed(derive_seed(self.spec.seed, "step", self.step))
        rate = learning_rate_at(self.spec, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, labels = self._to_device(pixels), labels.to(self.device, non_blocking=True)
        with self._autocast():
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.spec.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            self._sums += _sums(loss, logits, labels)

    def _evaluate(self, metrics: dict[str, float]) -> Iterator[Report]:
        """Add val_loss, val_acc1 and val_acc5 to `metrics`."""
        self.network.eval()
        sums = torch.zeros_like(self._sums)
        for rows in torch.split(torch.arange(len(self._val.labels)), _EVAL_BATCH_FACTOR * self.spec.batch_size):
            # inference_mode must not stay open over a yield: the caller may save or train in between.
            with torch.inference_mode(), self._autocast():
                labels = self._val.labels[rows].to(self.device)
                logits = self.network(self._to_device(self._val.eval_batch(rows))).float()
                sums += _sums(F.cross_entropy(logits, labels), logits, labels)
            yield EvaluationStep(self.finished_epochs + 1, self.step)
        loss, acc1, acc5 = _means(sums)
        metrics.update(val_loss=loss, val_acc1=acc1, val_acc5=acc5)

    def running_metrics(self) -> dict[str, float]:
        """Return train_loss, train_acc1, train_acc5 (percent) of the epoch so far, and the learning rate."""
        loss, acc1, acc5 = _means(self._sums)
        rate = float(self.optimizer.param_groups[0]["lr"])
        return {"train_loss": loss, "train_acc1": acc1, "train_acc5": acc5, "learning_rate": rate}

    def _to_device(self, pixels: Tensor) -> Tensor:
        images = normalise(pixels.to(self.device, non_blocking=True), self._preprocessing)
        return images.contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> AbstractContextManager[object]:
        enabled = self.spec.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def snapshot(self) -> dict[str, Tensor]:
        """Return the optimizer's state, the position, the sums of the epoch so far, and the best accuracy."""
        return {
            **optimizer_tensors(self.optimizer, self.network),
            "position": torch.tensor([self.step, self.finished_epochs], dtype=torch.int64),
            "sums": self._sums.cpu(),
            "best": torch.tensor([self._best_acc1], dtype=torch.float64),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a snapshot."""
        load_optimizer_tensors(self.optimizer, self.network, tensors)
        self.step, self.finished_epochs = (int(value) for value in tensors["position"])
        self._sums = tensors["sums"].clone().to(self.device)
        self._best_acc1 = float(tensors["best"][0])


def _sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return (4,): the summed loss, the number right at rank 1, at rank 5 (or all classes), and the count."""
    count = len(labels)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    right = ranked[:, 0].sum(), ranked.sum()
    mean = loss.detach().double()
    return torch.stack((mean * count, right[0].double(), right[1].double(), torch.full_like(mean, count)))


def _means(sums: Tensor) -> tuple[float, float, float]:
    """Return the mean loss, and the accuracies at ranks 1 and 5 in percent."""
    loss, right1, right5, count = sums.tolist()
    count = max(count, 1.0)
    return loss / count, 100 * right1 / count, 100 * right5 / count
