"""How well a language model predicts a text: the loss of each token, with the state carried from window to window.

The text is read as one row, so no token is dropped and none loses what came before it: neither a batch size nor the
window, which only bounds memory, changes the perplexity, to float rounding. The first token has nothing before it and
is not predicted: N tokens give N - 1 losses.

`token_losses` is the plain evaluation. `neural_cache.cache_losses` and `dynamic_evaluation.dynamic_losses` let the
model learn from the part of the text that it has been scored on; what they give is another figure, never "perplexity"
without their names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from services.trainer.engine.output_loss import output_losses
from services.trainer.engine.precision import autocast, layer_precision
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
    model = cast(LanguageModel, network.eval())
    head_dtype = torch.bfloat16 if reading.precision == "bfloat16" else torch.float32
    precision = layer_precision(network, reading.device, reading.precision)
    state: ModelState | None = None
    for inputs, targets in windows(tokens[None], reading.window):
        with torch.inference_mode():
            with autocast(reading.device, precision):
                hidden, state = model.encode(inputs.to(reading.device), state)
            followers = targets[0].to(reading.device)
            losses = output_losses(hidden[0], model.head.weight, model.head.bias, followers, head_dtype)
        yield ScoredWindow(losses, hidden[0].float(), followers)
