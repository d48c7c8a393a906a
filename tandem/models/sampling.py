"""From logits to the next token: temperature, top_k and top_p, with a random stream for each sequence.

The random number of a draw is a pure function of (seed, position): Philox, a counter-based generator (Salmon et al.
2011). So a sequence's words don't depend on its neighbours, nor on how its steps were cut into pieces.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.errors import InvalidRequest


@dataclass(frozen=True)
class Sampling:
    """How words are drawn. `temperature` 0 takes the likeliest; `top_k` 0 and `top_p` 0 mean all words.

    Raises InvalidRequest, with the field, for values that make no sense.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    allow_unknown: bool = False

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not 0 <= self.temperature < math.inf:
            raise _invalid("temperature", self.temperature, "a number of 0 or above")
        if self.top_k < 0:
            raise _invalid("top_k", self.top_k, "0 (all words) or above")
        if not 0 <= self.top_p <= 1:
            raise _invalid("top_p", self.top_p, "between 0 (all words) and 1")
        if not 0 <= self.seed < 2**64:
            raise _invalid("seed", self.seed, "between 0 and 2**64 - 1")


def _invalid(field: str, value: float, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {value}; it must be {expected}", field=f"sampling.{field}")


def uniform(seed: int, position: int) -> float:
    """Return the random number, 0 ≤ u < 1, of the draw at `position` (from 0) of the sequence with `seed`."""
    return (int(np.random.Philox(key=seed, counter=position).random_raw()) >> 11) * 2.0**-53


def draw(logits: Tensor, sampling: Sampling, position: int, masked_id: int | None = None) -> tuple[int, float]:
    """Draw one token from `logits` (V,); return its id and its log-probability in nats.

    The log-probability is the model's own: at temperature 1, over all tokens. `masked_id` is never drawn (unless it
    is the whole vocabulary).
    """
    logits = logits.float()
    allowed = _mask(logits, masked_id) if logits.numel() > 1 else logits
    if sampling.temperature == 0:
        token_id = int(allowed.argmax())
    else:
        token_id = _invert(probabilities(allowed, sampling), uniform(sampling.seed, position))
    return token_id, float(logits[token_id] - logits.logsumexp(0))


def _mask(logits: Tensor, masked_id: int | None) -> Tensor:
    if masked_id is None:
        return logits
    allowed = logits.clone()
    allowed[masked_id] = -torch.inf
    return allowed


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities (V,), float64, that tokens are drawn with: temperature, then top_k, then top_p.

    top_p keeps the likeliest tokens until they hold that much; the one that passes the mark is kept. Of equally likely
    tokens at a cut, the lower ids stay.
    """
    # The largest is subtracted first, so that a tiny temperature can't overflow.
    scaled = (logits.double() - logits.max().double()) / sampling.temperature
    weights = torch.softmax(scaled, 0)
    if not sampling.top_k and not sampling.top_p:
        return weights
    ordered, order = weights.sort(descending=True, stable=True)
    if sampling.top_k:
        ordered[sampling.top_k :] = 0
    if sampling.top_p:
        before = ordered.cumsum(0) - ordered
        ordered[before >= sampling.top_p * ordered.sum()] = 0
    kept = torch.zeros_like(weights).scatter_(0, order, ordered)
    return kept / kept.sum()


def _invert(weights: Tensor, number: float) -> int:
    """Return the token whose slice of the cumulative distribution holds `number`, 0 ≤ number < 1."""
    cumulative = weights.cumsum(0)
    token_id = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    # Rounding can lead past the last token that has a probability.
    return token_id if token_id < weights.numel() and weights[token_id] > 0 else int(weights.nonzero()[-1])
