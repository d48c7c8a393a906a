"""How well a language model predicts a text: the loss of each token, with the state carried from window to window.

The text is read as one row, so no token is dropped and none loses what came before it: neither a batch size nor the
window, which only bounds memory, changes the perplexity, to float rounding. The first token has nothing before it and
is not predicted: N tokens give N - 1 losses.

`token_losses` is the plain evaluation. `neural_cache.cache_losses` and `dynamic_evaluation.dynamic_losses` let the
model learn from the part of the text that it has been scored on; what they give is another figure, never "perplexity"
without their names.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.engine.precision import autocast
from tandem.data.corpus import windows
from tandem.models.language_models import LanguageModel, ModelState


@dataclass(frozen=True)
class Reading:
    """How a text is read: where, in which precision, and how many tokens at a time."""

    device: torch.device
    precision: Literal["float32", "bfloat16"] = "float32"
    window: int = 256


@dataclass(frozen=True)
class ScoredWindow:
    """A window of T tokens: their losses (T,), float32, in nats, hidden states (T, H) before them, and their ids."""

    losses: Tensor
    hidden: Tensor
    targets: Tensor


def token_losses(network: nn.Module, tokens: Tensor, reading: Reading) -> Iterator[Tensor]:
    """Yield the losses of tokens (N,) after the first, in nats, window by window: (T,) float32, on the CPU.

    The network is left in eval mode, and otherwise as it was.
    """
    for scored in scored_windows(network, tokens, reading):
        yield scored.losses.cpu()


def scored_windows(network: nn.Module, tokens: Tensor, reading: Reading) -> Iterator[ScoredWindow]:
    """Yield each window of tokens (N,), int64, scored; its tensors are on the reading's device."""
    network.eval()
    state: ModelState | None = None
    for inputs, targets in windows(tokens[None].to(reading.device), reading.window):
        with torch.inference_mode(), autocast(reading.device, reading.precision):
            hidden, losses, state = score(network, inputs, targets, state)
        yield ScoredWindow(losses, hidden, targets[0])


def score(
    network: nn.Module, inputs: Tensor, targets: Tensor, state: ModelState | None
) -> tuple[Tensor, Tensor, ModelState]:
    """Return, for inputs and targets (1, T): hidden (T, H) and losses (T,), float32, and the state after them."""
    model = cast(LanguageModel, network)
    hidden, after = model.encode(inputs, state)
    logits = model.head(model.output_dropout(hidden)).float()
    return hidden[0].float(), F.cross_entropy(logits[0], targets[0], reduction="none"), after


def perplexity(loss: float) -> float:
    """Return exp(loss); a loss beyond 700 nats, where that overflows, gives the largest float."""
    return math.exp(min(loss, 700.0))
