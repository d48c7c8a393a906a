"""Dynamic evaluation (Krause, Kahembwe, Murray and Renals 2018): the weights follow the text that is read.

The text is read in segments. The loss of a segment is noted first; then the weights learn from it, and decay back to
the trained ones. With the gradient g of the segment's mean loss, weights w and trained weights w_0:

    sgd   w ← w - rate · g                    + decay · (w_0 - w)
    rms   w ← w - rate · g / (r + epsilon)    + min(decay · r / mean(r), 1) · (w_0 - w)

where r is the root mean square of each weight's gradient over windows of the training text (`gradient_statistics`),
and mean(r) its mean over each tensor, then over the tensors, as in the authors' code. `rms` is the paper's best; its
rates hardly depend on the network. A copy of the network learns: the one that is given stays as it is.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.engine.precision import autocast, layer_precision
from services.trainer.engine.text_evaluation import Reading
from tandem.data.corpus import columns, windows
from tandem.models.language_models import ModelState, detach

_EPSILON = 2e-5
# The authors' 100 rows of 20 tokens; longer segments in as many rows would need memory without end.
_STATISTICS_ROWS = 100
_STATISTICS_TOKENS = 2000


@dataclass(frozen=True)
class DynamicSettings:
    """Tokens of a segment, and how fast the weights learn and are drawn back."""

    segment: int = 20
    rate: float = 1.2e-4
    decay: float = 8e-3


class GradientStatistics:
    """The root mean square of each parameter's gradient, in the order of `network.parameters()`."""

    def __init__(self, network: nn.Module) -> None:
        self._squares = [torch.zeros_like(each) for each in network.parameters()]
        self._num_windows = 0

    def add(self, gradients: tuple[Tensor, ...]) -> None:
        """Count the gradients of one more window."""
        for squares, gradient in zip(self._squares, gradients, strict=True):
            squares.addcmul_(gradient, gradient)
        self._num_windows += 1

    def roots(self) -> list[Tensor]:
        """Return the root mean squares."""
        return [(squares / self._num_windows).sqrt() for squares in self._squares]


def gradient_statistics(
    network: nn.Module, tokens: Tensor, reading: Reading, segment: int, into: GradientStatistics
) -> Iterator[int]:
    """Add up the gradients over training tokens (N,) in windows of `segment`; yield the tokens of each window.

    The text is read in at most 100 rows, fewer of long segments or of a short text.
    """
    learner = _trainable(network)
    weights = list(learner.parameters())
    num_rows = min(_STATISTICS_ROWS, _STATISTICS_TOKENS // segment, len(tokens) // (2 * segment))
    rows = columns(tokens, max(num_rows, 1)).to(reading.device)
    state: ModelState | None = None
    for inputs, targets in windows(rows, segment):
        with torch.enable_grad(), autocast(reading.device, layer_precision(learner, reading.device, reading.precision)):
            logits, state = learner(inputs, state)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        into.add(torch.autograd.grad(loss, weights))
        state = detach(state)
        yield targets.numel()


def dynamic_losses(
    network: nn.Module,
    tokens: Tensor,
    reading: Reading,
    settings: DynamicSettings,
    statistics: GradientStatistics | None = None,
) -> Iterator[Tensor]:
    """Yield the losses of tokens (N,) after the first, in nats, segment by segment: (T,) float32, on the CPU.

    The rule is rms with `statistics` and sgd without. The segment is the window: `reading.window` plays no part.
    """
    learner = _trainable(network)
    update = _Update(network, learner, settings, statistics)
    state: ModelState | None = None
    for inputs, targets in windows(tokens[None].to(reading.device), settings.segment):
        with torch.enable_grad(), autocast(reading.device, layer_precision(learner, reading.device, reading.precision)):
            logits, state = learner(inputs, state)
            losses = F.cross_entropy(logits[0].float(), targets[0], reduction="none")
        yield losses.detach().cpu()
        update.learn(losses.mean())
        state = detach(state)


def _trainable(network: nn.Module) -> nn.Module:
    """Return a copy of `network` that can learn, without dropout.

    cuDNN has gradients of a recurrent layer in training mode alone, so those layers are in it, with no dropout left.
    """
    learner = copy.deepcopy(network).eval().requires_grad_(True)
    for module in learner.modules():
        if isinstance(module, nn.RNNBase):
            module.train()
            module.dropout = 0.0
            module.flatten_parameters()
    return learner


class _Update:
    """The rule, bound to the weights that learn and to those that draw them back."""

    def __init__(
        self, trained: nn.Module, learner: nn.Module, settings: DynamicSettings, statistics: GradientStatistics | None
    ) -> None:
        self._weights, self._trained = list(learner.parameters()), list(trained.parameters())
        self._settings = settings
        self._roots = statistics.roots() if statistics else None
        self._decays = _decays(self._roots, settings.decay) if self._roots else None

    def learn(self, loss: Tensor) -> None:
        """Take one step on `loss`, and one back towards the trained weights."""
        gradients = torch.autograd.grad(loss, self._weights)
        with torch.no_grad():
            for number, (weight, gradient) in enumerate(zip(self._weights, gradients, strict=True)):
                pull = (self._trained[number] - weight).mul_(self._decay(number))
                step = gradient if self._roots is None else gradient / (self._roots[number] + _EPSILON)
                weight.sub_(step, alpha=self._settings.rate).add_(pull)

    def _decay(self, number: int) -> Tensor | float:
        return self._settings.decay if self._decays is None else self._decays[number]


def _decays(roots: list[Tensor], decay: float) -> list[Tensor]:
    mean = torch.stack([root.mean() for root in roots]).mean()
    # Above 1 a weight would overshoot the one that it is drawn to.
    return [(decay * root / mean).clamp_(max=1.0) for root in roots]
