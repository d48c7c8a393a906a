"""Training a language model: windows of a long text with the state carried, and token-weighted evaluation."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.engine.optimizer_state import decayed_groups, load_optimizer_tensors, optimizer_tensors
from services.trainer.engine.precision import autocast
from services.trainer.engine.reports import EpochDone, EvaluationStep, Report, StepDone, check_finite
from tandem.data.corpus import columns, num_windows, window, windows
from tandem.data.randomness import derive_seed
from tandem.jobs.spec import LanguageModelJob
from tandem.models.devices import resolve_precision
from tandem.models.language_models import ModelState, detach

# Evaluation reads the text as one row, so that no token is dropped and perplexity depends on no batch size.
_EVAL_WINDOW = 256
_ANNEALING = 4.0


class LanguageModelTraining:
    """The state of a training run between two steps, and the loop that moves it on.

    Dropout is a function of (seed, step); the state carried from window to window is part of the snapshot.
    """

    def __init__(
        self, spec: LanguageModelJob, network: nn.Module, train: Tensor, val: Tensor, device: torch.device
    ) -> None:
        self.spec = spec
        self.device = device
        self.network = network.to(device)
        self.optimizer = _optimizer(spec, network)
        self._rows = columns(train, spec.batch_size).to(device)
        self._val = val
        self.steps_per_epoch = num_windows(self._rows.shape[1], spec.bptt)
        self.step = 0
        self.finished_epochs = 0
        self.learning_rate = spec.learning_rate
        self._state: ModelState | None = None
        self._best_loss = math.inf
        self._sums = torch.zeros(2, device=device, dtype=torch.float64)

    @property
    def served_network(self) -> nn.Module:
        """The network that is evaluated and saved."""
        return self.network

    def fit(self) -> Iterator[Report]:
        """Yield a report after each update, each part of an evaluation, and each epoch."""
        while self.finished_epochs < self.spec.epochs:
            yield from self._train_epoch(self.finished_epochs)
            metrics = self.running_metrics()
            check_finite(metrics["train_loss"], self.finished_epochs + 1, self.step)
            losses: list[float] = []
            yield from self._evaluate(self._val, losses)
            check_finite(losses[0], self.finished_epochs + 1, self.step)
            metrics.update(val_loss=losses[0], val_ppl=perplexity(losses[0]))
            improved = self._anneal(losses[0])
            self.finished_epochs += 1
            self._state = None
            self._sums.zero_()
            yield EpochDone(self.finished_epochs, self.step, metrics, improved)

    def _train_epoch(self, epoch: int) -> Iterator[Report]:
        self.network.train()
        first_step = epoch * self.steps_per_epoch
        while self.step < first_step + self.steps_per_epoch:
            inputs, targets = window(self._rows, self.step - first_step, self.spec.bptt)
            self._update(inputs, targets)
            yield StepDone(epoch + 1, self.step, targets.numel())

    def _update(self, inputs: Tensor, targets: Tensor) -> None:
        torch.manual_seed(derive_seed(self.spec.seed, "step", self.step))
        with self._autocast():
            logits, state = self.network(inputs, self._state)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        self._state = detach(state)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), self.spec.clip_norm)
        self.optimizer.step()
        self.step += 1
        self._sums += torch.stack((loss.detach().double() * targets.numel(), loss.new_tensor(targets.numel()).double()))

    def _evaluate(self, tokens: Tensor, losses: list[float]) -> Iterator[Report]:
        """Append the mean loss (nats a token) over `tokens` to `losses`."""
        self.network.eval()
        state: ModelState | None = None
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for inputs, targets in windows(columns(tokens, 1).to(self.device), _EVAL_WINDOW):
            with torch.inference_mode(), self._autocast():
                logits, state = self.network(inputs, state)
                total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
            yield EvaluationStep(self.finished_epochs + 1, self.step)
        losses.append(float(total) / (len(tokens) - 1))

    def evaluate(self, tokens: Tensor) -> float:
        """Return the mean loss of the network, in nats a token, over tokens (N,)."""
        losses: list[float] = []
        for _ in self._evaluate(tokens, losses):
            pass
        return losses[0]

    def _anneal(self, loss: float) -> bool:
        """Note the val loss; divide the learning rate by 4 where it did not improve. Return whether it did."""
        improved = loss < self._best_loss
        self._best_loss = min(self._best_loss, loss)
        if not improved:
            self._set_learning_rate(self.learning_rate / _ANNEALING)
        return improved

    def _set_learning_rate(self, rate: float) -> None:
        self.learning_rate = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def running_metrics(self) -> dict[str, float]:
        """Return train_loss and train_ppl of the epoch so far, and the learning rate."""
        total, count = self._sums.tolist()
        loss = total / max(count, 1.0)
        return {"train_loss": loss, "train_ppl": perplexity(loss), "learning_rate": self.learning_rate}

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.device, resolve_precision(self.spec.precision, self.device))

    def forget_best(self) -> None:
        """Let the next epoch be the best so far: what was better belongs to another run."""
        self._best_loss = math.inf

    def snapshot(self) -> dict[str, Tensor]:
        """Return the optimizer's state, the position, the carried state, the rate, and the best loss."""
        carried = {f"state/{number}": part.cpu() for number, part in enumerate(self._state or ())}
        return {
            **optimizer_tensors(self.optimizer, self.network),
            **{name: part.contiguous() for name, part in carried.items()},
            "position": torch.tensor([self.step, self.finished_epochs], dtype=torch.int64),
            "sums": self._sums.cpu(),
            "rates": torch.tensor([self.learning_rate, self._best_loss], dtype=torch.float64),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a snapshot."""
        load_optimizer_tensors(self.optimizer, self.network, tensors)
        self.step, self.finished_epochs = (int(value) for value in tensors["position"])
        self._sums = tensors["sums"].clone().to(self.device)
        rate, self._best_loss = tensors["rates"].tolist()
        self._set_learning_rate(rate)
        names = sorted((name for name in tensors if name.startswith("state/")), key=lambda name: int(name[6:]))
        self._state = tuple(tensors[name].clone().to(self.device) for name in names) or None


def _optimizer(spec: LanguageModelJob, network: nn.Module) -> torch.optim.Optimizer:
    groups = decayed_groups(network, spec.weight_decay)
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=spec.learning_rate)
    return torch.optim.AdamW(groups, lr=spec.learning_rate)


def perplexity(loss: float) -> float:
    """Return exp(loss); a loss beyond 700 nats, where that overflows, gives the largest float."""
    return math.exp(min(loss, 700.0))
