"""Training a language model: windows of a long text with the state carried, and token-weighted evaluation."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from services.trainer.engine.carried_state import gathered, state_tensors, taken_apart
from services.trainer.engine.optimizer_state import decayed_groups, load_optimizer_tensors, optimizer_tensors
from services.trainer.engine.ranks import ALONE, Ranks
from services.trainer.engine.reports import EpochDone, EvaluationStep, Report, StepDone, check_finite
from services.trainer.engine.running_mean import RunningMean, is_stuck
from services.trainer.engine.schedule import learning_rate_at
from services.trainer.engine.sequence_loss import SequenceLoss
from services.trainer.engine.text_evaluation import Reading, token_losses
from services.trainer.engine.text_windows import window_bounds
from services.trainer.engine.uncompiled import take_step
from services.trainer.engine.wrapping import exchanging
from tandem.comparison.token_losses import perplexity
from tandem.data.corpus import columns, num_windows, span
from tandem.data.randomness import derive_seed, generator
from tandem.errors import TrainingFailed
from tandem.jobs.spec import LanguageModelJob
from tandem.models.devices import resolve_precision
from tandem.models.language_models import ModelState, detach
from tandem.models.weights import bare_state, load_weights

_ANNEALING = 4.0
# Of an evaluation, which carries its state on: they bound memory, and the larger keeps a GPU busy.
_CPU_WINDOW, _GPU_WINDOW = 256, 2048
_RAW = "network/"
# A longer text stays mapped into memory, and its windows are read as they are used.
_RESIDENT_BYTES = 256 * 2**20


class LanguageModelTraining:
    """The state of a training run between two steps, and the loop that moves it on.

    Dropout and the lengths of windows are functions of (seed, epoch, step); the state carried from window to window is
    part of the snapshot. With several processes (`ranks`) each has its share of the batch's rows.
    """

    def __init__(
        self,
        spec: LanguageModelJob,
        network: nn.Module,
        train: Tensor,
        val: Tensor,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.spec, self.device, self.ranks = spec, device, ranks
        self.network = network.to(device)
        self.optimizer = _optimizer(spec, network, device)
        self._rows, self._val = self._share(columns(train, spec.batch_size)), val
        self.steps_per_epoch = num_windows(self._rows.shape[1], spec.bptt)
        self.step = 0
        self.finished_epochs = 0
        self._annealed = 1.0
        self._loss = SequenceLoss(self.network, spec, device)
        self._forward: Any = exchanging(self._loss, ranks, self._example_loss)
        self._states: list[ModelState | None] = [None] * spec.accumulation
        self._val_losses: list[float] = []
        self._average: RunningMean | None = None
        # Loss, tokens, gradient norms, updates.
        self._sums = torch.zeros(4, device=device, dtype=torch.float64)

    def _share(self, rows: Tensor) -> Tensor:
        mine = self.ranks.share(rows)
        return mine.to(self.device) if mine.nbytes <= _RESIDENT_BYTES else mine

    @property
    def served_network(self) -> nn.Module:
        """The network that is evaluated and saved: the mean of the weights once averaging has begun."""
        return self._average.network if self._average else self.network

    def fit(self) -> Iterator[Report]:
        """Yield a report after each update, each part of an evaluation, and each epoch."""
        while self.finished_epochs < self.spec.epochs:
            yield from self._epoch(self.finished_epochs)

    def _epoch(self, epoch: int) -> Iterator[Report]:
        yield from self._train_epoch(epoch)
        metrics = self._metrics(self.ranks.sum(self._sums))
        check_finite(metrics["train_loss"], epoch + 1, self.step)
        losses: list[float] = []
        yield from self._evaluate(self._val, losses)
        check_finite(losses[0], epoch + 1, self.step)
        metrics.update(val_loss=losses[0], val_ppl=perplexity(losses[0]))
        improved = self._judge(losses[0])
        self.finished_epochs += 1
        self._states = [None] * self.spec.accumulation
        self._sums.zero_()
        yield EpochDone(self.finished_epochs, self.step, metrics, improved)

    def _train_epoch(self, epoch: int) -> Iterator[Report]:
        self.network.train()
        bounds = self._bounds(epoch)
        first_step = epoch * self.steps_per_epoch
        for number in range(self.step - first_step, self.steps_per_epoch):
            count = self._update(bounds[number], bounds[number + 1])
            yield StepDone(epoch + 1, self.step, count)

    def _bounds(self, epoch: int) -> list[int]:
        randomness = generator(self.spec.seed, "windows", epoch) if self.spec.variable_bptt else None
        return window_bounds(self._rows.shape[1], self.spec.bptt, randomness)

    def _update(self, first: int, last: int) -> int:
        """Train on the tokens from `first` up to `last` of each row; return how many all processes had."""
        rank_part = (self.ranks.rank,) if self.ranks.rank else ()
        torch.manual_seed(derive_seed(self.spec.seed, "step", self.step, *rank_part))
        self._set_rate(self._rate() * (last - first) / self.spec.bptt if self.spec.variable_bptt else self._rate())
        self.optimizer.zero_grad(set_to_none=True)
        inputs, targets = span(self._rows, first, last)
        inputs, targets = inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        count, parts = self.spec.batch_size * (last - first), self.spec.accumulation
        pairs = zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True)
        for number, (part, wanted) in enumerate(pairs):
            self._backward(number, part, wanted, count)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.spec.clip_norm)
        take_step(self.optimizer)
        self.step += 1
        if self._average:
            self._average.update()
        self._sums[2] += norm.detach()
        self._sums[3] += 1
        return count

    def _backward(self, number: int, inputs: Tensor, targets: Tensor, count: int) -> None:
        """Add the gradient of part `number` over `count`, the tokens of the whole update."""
        # The gradients of the processes are averaged once, after the last part.
        alone = self.ranks.size > 1 and number < self.spec.accumulation - 1
        with self._forward.no_sync() if alone else nullcontext():
            found = self._forward(inputs, targets, self._states[number])
            # DistributedDataParallel takes the mean over processes; the mean over all tokens is what is wanted.
            (found.objective * (self.ranks.size / count)).backward()
        self._states[number] = detach(found.state)
        self._sums[0] += found.loss
        self._sums[1] += targets.numel()

    def _example_loss(self, forward: Any) -> Tensor:
        tokens = self._rows[:1, :2].long().to(self.device)
        objective: Tensor = forward(tokens, tokens, None).objective
        return objective

    def _evaluate(self, tokens: Tensor, losses: list[float]) -> Iterator[Report]:
        """Append the mean loss (nats a token) over `tokens` to `losses`."""
        window = _GPU_WINDOW if self.device.type == "cuda" else _CPU_WINDOW
        reading = Reading(self.device, resolve_precision(self.spec.precision, self.device), window)
        total = torch.zeros((), dtype=torch.float64)
        for found in token_losses(self.served_network, tokens, reading):
            total += found.sum(dtype=torch.float64)
            yield EvaluationStep(self.finished_epochs + 1, self.step)
        losses.append(float(total) / (len(tokens) - 1))

    def evaluate(self, tokens: Tensor, within_s: float = math.inf) -> float | None:
        """Return the mean loss of the network, in nats a token, over tokens (N,); None if it takes too long."""
        losses: list[float] = []
        ends_at = time.monotonic() + within_s
        for _ in self._evaluate(tokens, losses):
            if time.monotonic() > ends_at:
                return None
        return losses[0]

    def _judge(self, loss: float) -> bool:
        """Note the val loss, and what follows from it for rate and averaging; return whether it is the best so far."""
        improved = loss < min(self._val_losses, default=math.inf)
        self._val_losses.append(loss)
        if self.spec.schedule == "anneal" and not improved:
            self._annealed /= _ANNEALING
        if self.spec.average_after and not self._average and is_stuck(self._val_losses, self.spec.average_after):
            self._average = RunningMean(self.network)
        return improved

    def _rate(self) -> float:
        return self._annealed * learning_rate_at(self.spec, self.step, self.steps_per_epoch)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def running_metrics(self) -> dict[str, float]:
        """Return train_loss, train_ppl and gradient_norm of this process's epoch so far, and the learning rate."""
        return self._metrics(self._sums)

    def _metrics(self, sums: Tensor) -> dict[str, float]:
        loss, tokens, norms, updates = sums.tolist()
        mean = loss / max(tokens, 1.0)
        rate = self._annealed * learning_rate_at(self.spec, max(self.step - 1, 0), self.steps_per_epoch)
        norm = norms / max(updates, 1.0)
        return {"train_loss": mean, "train_ppl": perplexity(mean), "gradient_norm": norm, "learning_rate": rate}

    def forget_best(self) -> None:
        """Let the next epoch be the best so far: what was better belongs to another run."""
        self._val_losses = []

    def snapshot(self) -> dict[str, Tensor]:
        """Return the optimizer's state, the position, the carried state of all rows, the rate, and the val losses.

        With averaging, whose mean is what is saved as the weights, also the weights that are trained. Each process
        must call this; carried state and sums are those of all.
        """
        raw = bare_state(self.network) if self._average else {}
        return {
            **optimizer_tensors(self.optimizer, self.network),
            **{_RAW + name: tensor for name, tensor in raw.items()},
            **state_tensors(gathered(self._states, self._batch_dimension, self.spec.batch_size, self.ranks)),
            "position": torch.tensor([self.step, self.finished_epochs, self.steps_per_epoch], dtype=torch.int64),
            "averaged": torch.tensor([self._average.num_updates if self._average else -1], dtype=torch.int64),
            "sums": self.ranks.sum(self._sums).cpu(),
            "annealed": torch.tensor([self._annealed], dtype=torch.float64),
            "val_losses": torch.tensor(self._val_losses, dtype=torch.float64),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a snapshot, the weights being loaded; raise TrainingFailed if its epochs had other steps."""
        self.step, self.finished_epochs, there = (int(value) for value in tensors["position"])
        if there != self.steps_per_epoch:
            raise TrainingFailed(
                f"the checkpoint's epochs have {there} steps, this run's {self.steps_per_epoch}: continue with the "
                "same --batch-size, --bptt and data"
            )
        self._average = None
        if (num_updates := int(tensors["averaged"][0])) >= 0:
            self._average = RunningMean(self.network, num_updates)
            raw = {name.removeprefix(_RAW): value for name, value in tensors.items() if name.startswith(_RAW)}
            load_weights(self.network, raw)
        load_optimizer_tensors(self.optimizer, self.network, tensors)
        self._sums = tensors["sums"].clone().to(self.device) * (1.0 if self.ranks.is_first else 0.0)
        self._annealed = float(tensors["annealed"][0])
        self._val_losses = tensors["val_losses"].tolist()
        self._states = taken_apart(tensors, self._batch_dimension, self.spec.accumulation, self.ranks, self.device)

    @property
    def _batch_dimension(self) -> int:
        dimension: int = self._loss.network.batch_dimension
        return dimension


def _optimizer(spec: LanguageModelJob, network: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    groups = decayed_groups(network, spec.weight_decay)
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=spec.learning_rate, momentum=spec.momentum, fused=device.type == "cuda")
    # One pass over the parameters; on a CPU too, where there are millions of them.
    return torch.optim.AdamW(groups, lr=spec.learning_rate, fused=True)
