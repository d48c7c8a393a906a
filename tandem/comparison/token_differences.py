"""Two language models on the same text, token by token: perplexities, their difference, and where they differ most.

Perplexities are compared by their mean losses, which pair up token by token. Neighbours are not independent, so
that the interval comes from a bootstrap over blocks of the text (Künsch 1989, Annals of Statistics 17:1217–1241; here
blocks do not overlap, after Carlstein 1986, ibid. 14:1171–1179), bias-corrected and accelerated (Efron 1987, JASA
82:171–185).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from tandem.comparison.evidence import Interval
from tandem.comparison.intervals import CONFIDENCE
from tandem.comparison.token_losses import perplexity

# Tokens of a block: a few paragraphs, well beyond what one sentence makes the next likelier to be.
BLOCK_TOKENS = 256
# A short text gets shorter blocks, so that there are so many; but none below a few tokens.
MIN_BLOCKS = 40
_MIN_BLOCK_TOKENS = 4
# From fewer an interval says nothing: of 2 blocks without a difference, 26 % showed one at a nominal 2.5 %, of 10 4 %.
FEWEST_BLOCKS = 20
NUM_RESAMPLES = 9999
_SEED = 0

Losses = np.ndarray[tuple[int], np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class TokenComparison:
    """Losses are in nats a token; `difference` is b - a, and `interval` is of it."""

    num_tokens: int
    loss_a: float
    loss_b: float
    interval: Interval
    block_tokens: int

    @property
    def difference(self) -> float:
        """Mean loss b - mean loss a: below 0 where b is better."""
        return self.loss_b - self.loss_a

    @property
    def perplexity_a(self) -> float:
        """exp of the mean loss of a."""
        return perplexity(self.loss_a)

    @property
    def perplexity_b(self) -> float:
        """exp of the mean loss of b."""
        return perplexity(self.loss_b)

    @property
    def share(self) -> float:
        """Perplexity b / perplexity a."""
        return perplexity(self.difference)

    @property
    def ratio(self) -> Interval:
        """The interval of perplexity b / perplexity a; (0, inf) where there is none."""
        low, high = self.interval
        return Interval(perplexity(low), math.inf if high == math.inf else perplexity(high))

    @property
    def has_interval(self) -> bool:
        """False where the text is too short for one."""
        return math.isfinite(self.interval.high)


def compare_losses(a: Losses, b: Losses, confidence: float = CONFIDENCE) -> TokenComparison:
    """Return the comparison of the losses (N,), in nats, of two models on the same N tokens.

    Raises ValueError where they are not of the same number of tokens, or of none. A text of fewer than FEWEST_BLOCKS
    blocks (80 tokens) has no interval but (-inf, inf); equal losses have (0, 0).
    """
    if a.shape != b.shape or not len(a):
        raise ValueError("the losses are not of the same tokens")
    differences = b.astype(np.float64) - a.astype(np.float64)
    length = max(_MIN_BLOCK_TOKENS, min(BLOCK_TOKENS, len(differences) // MIN_BLOCKS))
    loss_a, loss_b = (float(losses.mean(dtype=np.float64)) for losses in (a, b))
    interval = _interval(block_means(differences, length), confidence)
    return TokenComparison(len(differences), loss_a, loss_b, interval, length)


def block_means(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Return the means of blocks of about `length` consecutive values (N,), whose lengths differ by one at most."""
    num_blocks = max(1, len(values) // length)
    starts = np.arange(num_blocks) * len(values) // num_blocks
    counts = np.diff([*starts, len(values)])
    return np.asarray(np.add.reduceat(values, starts) / counts, dtype=np.float64)


def largest_differences(a: Losses, b: Losses, count: int) -> list[int]:
    """Return the places of the `count` tokens whose losses differ most, largest first; of equal ones the earlier."""
    apart = np.abs(b.astype(np.float64) - a.astype(np.float64))
    return [int(place) for place in np.argsort(-apart, kind="stable")[:count]]


def _interval(means: NDArray[np.float64], confidence: float) -> Interval:
    if np.ptp(means) == 0 and means[0] == 0:
        return Interval(0.0, 0.0)
    if len(means) < FEWEST_BLOCKS:
        return Interval(-math.inf, math.inf)
    if np.ptp(means) == 0:
        return Interval(float(means[0]), float(means[0]))
    generator = np.random.default_rng(_SEED)
    # In batches, so that a text of a million tokens takes no gigabytes.
    found = bootstrap(
        (means,),
        np.mean,
        confidence_level=confidence,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, 4_000_000 // len(means)),
        rng=generator,
    ).confidence_interval
    if math.isnan(found.low) or math.isnan(found.high):
        # Beyond what so many resamples can tell.
        return Interval(-math.inf, math.inf)
    return Interval(float(found.low), float(found.high))
