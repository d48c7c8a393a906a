"""Training a classifier: SGD over augmented batches, and evaluation over the val split."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.engine.batches import StepRows, make_batches, steps_per_epoch
from services.trainer.engine.ema import MovingAverage
from services.trainer.engine.evaluation import Evaluator
from services.trainer.engine.memory import is_out_of_memory, largest_that_fits
from services.trainer.engine.mixing import make_mix
from services.trainer.engine.optimizer_state import decayed_groups, load_optimizer_tensors, optimizer_tensors
from services.trainer.engine.precision import autocast, training_precision
from services.trainer.engine.ranks import ALONE, Ranks
from services.trainer.engine.reports import EpochDone, EvaluationStep, Report, StepDone, check_finite
from services.trainer.engine.schedule import image_size_at, learning_rate_at
from services.trainer.engine.small_maps import with_small_maps
from services.trainer.engine.tally import tally, tally_metrics
from services.trainer.engine.uncompiled import take_step
from services.trainer.engine.wrapping import wrapped
from tandem.checkpoints.card import Preprocessing
from tandem.data.randomness import derive_seed, generator
from tandem.data.splits import ImageSplit
from tandem.errors import OutOfMemory, TrainingFailed
from tandem.jobs.spec import ClassifierJob
from tandem.models.weights import bare_state, load_weights

# Without gradients an evaluation batch takes less memory than a training batch of half its size.
_EVAL_BATCH_FACTOR = 2
_RAW = "network/"


class ClassifierTraining:
    """The state of a training run between two steps, and the loop that moves it on.

    The order of images and their augmentation are functions of (seed, epoch, step), and so is dropout; hence a run
    that goes on from a snapshot computes what it would have computed. With several processes (`ranks`) each computes
    its share of every batch; order and augmentation do not depend on how many there are.

    `timer` is entered around the parts of a step ("forward", "backward", "update"), for benchmarks.
    """

    def __init__(
        self,
        spec: ClassifierJob,
        network: nn.Module,
        train: ImageSplit,
        val: ImageSplit,
        preprocessing: Preprocessing,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.spec, self.device, self.ranks = spec, device, ranks
        self.steps_per_epoch = steps_per_epoch(spec, len(train.labels), len(val.labels))
        smallest = min(preprocessing.image_size, spec.start_size or preprocessing.image_size)
        self._precision = training_precision(spec, network.to(device), device, smallest)
        if device.type == "cpu" and self._precision == "bfloat16":
            with_small_maps(network)
        self.network = network.to(memory_format=torch.channels_last)
        self.timer: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext()
        self.step = spec.start_epoch * self.steps_per_epoch
        self.finished_epochs = spec.start_epoch
        self.val = val
        self._train, self._preprocessing = train, preprocessing
        self._average = MovingAverage(self.network, spec.ema_decay) if spec.ema_decay else None
        self._forward = wrapped(self.network, spec, smallest, ranks)
        eval_batch_size = max(_EVAL_BATCH_FACTOR * spec.batch_size // (ranks.size * spec.accumulation), 1)
        self.evaluator = Evaluator(preprocessing, device, self._precision, eval_batch_size, ranks)
        self.optimizer = torch.optim.SGD(
            decayed_groups(self.network, spec.weight_decay, spec.decay_all),
            lr=spec.learning_rate,
            momentum=spec.momentum,
            nesterov=spec.nesterov and spec.momentum > 0,
            # One kernel for all parameters; on a CPU no faster (206 against 201 ms a step of ResNet-18).
            fused=device.type == "cuda",
        )
        self.batches = make_batches(spec, train, preprocessing, device, ranks)
        self._mix = make_mix(spec, network, preprocessing)
        self._best_acc1 = -1.0
        self._is_evaluating = False
        self._sums = torch.zeros(4, device=device, dtype=torch.float64)

    @property
    def served_network(self) -> nn.Module:
        """The network that is evaluated and saved: the moving average where there is one."""
        return self._average.network if self._average else self.network

    def fit(self) -> Iterator[Report]:
        """Yield a report after each update, each part of an evaluation, and each epoch."""
        try:
            while self.finished_epochs < self.spec.epochs:
                yield from self._epoch()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        else:
            return
        # Outside the handler: the traceback would hold the tensors that are in the way.
        raise OutOfMemory(self._advice(reason))

    def _epoch(self) -> Iterator[Report]:
        epoch = self.finished_epochs
        yield from self._train_epoch(epoch)
        metrics = tally_metrics(self.ranks.sum(self._sums), self._rate())
        check_finite(metrics["train_loss"], epoch + 1, self.step)
        self.ranks.copy_from_first(self.served_network)
        self._is_evaluating = True
        evaluation = self.evaluator.predict(self.served_network, self.val)
        for _ in evaluation:
            yield EvaluationStep(epoch + 1, self.step)
        self._is_evaluating = False
        metrics.update(evaluation.predictions.metrics())
        check_finite(metrics["val_loss"], epoch + 1, self.step)
        improved = metrics["val_acc1"] > self._best_acc1
        self._best_acc1 = max(self._best_acc1, metrics["val_acc1"])
        metrics["val_best_acc1"] = self._best_acc1
        self.finished_epochs += 1
        self._sums.zero_()
        yield EpochDone(self.finished_epochs, self.step, metrics, improved)

    def _train_epoch(self, epoch: int) -> Iterator[Report]:
        self.network.train()
        for batch in self.batches.make(self._steps(epoch)):
            self._update(*batch)
            yield StepDone(epoch + 1, self.step, batch.num_all)

    def _steps(self, epoch: int) -> Iterator[StepRows]:
        order = torch.randperm(len(self._train.labels), generator=generator(self.spec.seed, "order", epoch))
        size = image_size_at(self.spec, epoch, self._preprocessing.image_size)
        first, batch_size = epoch * self.steps_per_epoch, self.spec.batch_size
        for step in range(self.step, first + self.steps_per_epoch):
            number = step - first
            yield StepRows(epoch, step, order[number * batch_size : (number + 1) * batch_size], size)

    def _update(self, pixels: Tensor, labels: Tensor, count: int) -> None:
        """Train on this process's share of a batch of `count` images."""
        torch.manual_seed(derive_seed(self.spec.seed, "step", self.step, *self._rank_part()))
        self._set_rate(learning_rate_at(self.spec, self.step, self.steps_per_epoch))
        images = self.evaluator.to_device(pixels)
        targets = labels
        if self._mix is not None:
            images, targets = self._mix(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.spec.accumulation
        for number, (part, wanted) in enumerate(
            zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
        ):
            self._backward(part, wanted, count, is_last=number == parts - 1)
        with self.timer("update"):
            take_step(self.optimizer)
            self.step += 1
            if self._average:
                self._average.update(self.step)

    def _rank_part(self) -> tuple[int, ...]:
        # Dropout and mixing must differ between processes; a single process keeps the seed it would have alone.
        return (self.ranks.rank,) if self.ranks.rank else ()

    def _backward(self, images: Tensor, targets: Tensor, count: int, is_last: bool) -> None:
        """Add the gradient of the loss of `images` over `count`, the images of the whole update."""
        # The gradients of the processes are averaged once, after the last part.
        alone = self.ranks.size > 1 and not is_last
        with self._forward.no_sync() if alone else nullcontext():
            with self.timer("forward"):
                with autocast(self.device, self._precision):
                    logits = self._forward(images)
                loss = F.cross_entropy(
                    logits.float(), targets, label_smoothing=self.spec.label_smoothing, reduction="sum"
                )
            with self.timer("backward"):
                # DistributedDataParallel takes the mean over processes; the sum over all images is what is wanted.
                (loss * (self.ranks.size / count)).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self._sums += tally(loss, logits, targets)

    def running_metrics(self) -> dict[str, float]:
        """Return train_loss, train_acc1, train_acc5 (percent) of this process's epoch so far, and the learning rate."""
        return tally_metrics(self._sums, self._rate())

    def _rate(self) -> float:
        return learning_rate_at(self.spec, max(self.step - 1, 0), self.steps_per_epoch)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _advice(self, reason: str) -> str:
        """Say which batch would have fitted."""
        if self._is_evaluating:
            there = self.evaluator.batch_size
            return f"{self.device} has no memory to evaluate {there} images; lower --batch-size or raise --accumulation"
        parts = self.spec.accumulation * self.ranks.size
        there = math.ceil(self.spec.batch_size / parts)
        size = image_size_at(self.spec, self.finished_epochs, self._preprocessing.image_size)
        message = f"{self.device} has no memory for {there} images of {size}×{size} at once"
        if self.ranks.size > 1:
            return f"{message}; lower --batch-size or raise --accumulation ({reason.splitlines()[0][:120]})"
        self.optimizer.zero_grad(set_to_none=True)
        fits = largest_that_fits(lambda count: self._try(count, size), there)
        if fits < 2:
            return f"{message}, nor for 2; take a smaller --image-size or --arch"
        split = math.ceil(self.spec.batch_size / fits)
        return (
            f"{message}; the largest batch that fits is {fits}: use --batch-size {fits}, or keep yours with "
            f"--accumulation {split}"
        )

    def _try(self, count: int, size: int) -> None:
        images = torch.zeros(count, 3, size, size, device=self.device).contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self._precision):
            logits = self.network(images)
        logits.float().sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def forget_best(self) -> None:
        """Let the next epoch be the best so far: what was better belongs to another run."""
        self._best_acc1 = -1.0

    def snapshot(self) -> dict[str, Tensor]:
        """Return the optimizer's state, the position, the sums of the epoch so far, and the best accuracy.

        With a moving average, which is what is saved as the weights, also the weights that are trained. Each process
        must call this; the sums are those of all.
        """
        raw = bare_state(self.network) if self._average else {}
        return {
            **optimizer_tensors(self.optimizer, self.network),
            **{_RAW + name: tensor for name, tensor in raw.items()},
            "position": torch.tensor([self.step, self.finished_epochs], dtype=torch.int64),
            "steps_per_epoch": torch.tensor([self.steps_per_epoch], dtype=torch.int64),
            "sums": self.ranks.sum(self._sums).cpu(),
            "best": torch.tensor([self._best_acc1], dtype=torch.float64),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a snapshot; raise TrainingFailed if its epochs had another number of steps."""
        there = int(tensors["steps_per_epoch"][0])
        if there != self.steps_per_epoch:
            raise TrainingFailed(
                f"the checkpoint's epochs have {there} steps, this run's {self.steps_per_epoch}: continue with the "
                "same --batch-size and data, or begin from its weights alone (--weights)"
            )
        raw = {name.removeprefix(_RAW): value for name, value in tensors.items() if name.startswith(_RAW)}
        if raw:
            load_weights(self.network, raw)
        elif self._average:
            raise TrainingFailed("the checkpoint has no moving average; use --weights, or --ema-decay 0")
        load_optimizer_tensors(self.optimizer, self.network, tensors)
        self.step, self.finished_epochs = (int(value) for value in tensors["position"])
        # The sums are of all processes: the first goes on with them, the others begin at zero.
        self._sums = tensors["sums"].clone().to(self.device) * (1.0 if self.ranks.is_first else 0.0)
        self._best_acc1 = float(tensors["best"][0])
