"""From logits to the next token, with a random stream for each sequence.

In this order: the biases, the repetition penalty, temperature, top_k, top_p, min_p. The random number of a draw is a
pure function of (seed, position): Philox, a counter-based generator (Salmon et al. 2011). So a sequence's words don't
depend on its neighbours, nor on how its steps were cut into pieces.

A draw of one of 33,278 words takes 0.1 ms after the head has emptied the caches (one core with AVX-512; the head itself
0.95 ms): exponentials in float32, sums of blocks, and no sort of the whole vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tandem.errors import InvalidRequest
from tandem.wire.limits import MAX_ALTERNATIVES, MAX_BIASES, MAX_STOP_WORDS

Floats = NDArray[np.float32]
# Which tokens: bool (V,).
TokenSet = NDArray[np.bool_]

# The cumulative distribution is searched by blocks of so many tokens first.
_BLOCK = 256
# Random numbers of a text that are made together.
_AT_ONCE = 64
# So few tokens are sorted at once.
_SORTED = 128
# Nearer to 0 the quotients are no different, but for logits below 1e-23.
_COLDEST = 1e-30
# All words are alike long before; float32 ends at 3e38.
_HOTTEST = 1_000_000.0


@dataclass(frozen=True)
class Sampling:
    """How words are drawn. `temperature` 0 takes the likeliest; 0 of `top_k`, `top_p` and `min_p` means all words.

    `min_p` keeps the words at least that much as likely as the likeliest (Nguyen et al. 2024). `repetition_penalty`
    divides the logits above 0, and multiplies those below, of every word that is in the prompt or was drawn already
    (Keskar et al. 2019; over the whole text, as Hugging Face has it); 1 leaves them alone. The text ends before the
    first of the words `stop`. With `random_start` the first word is drawn from all words alike, but for `<unk>`,
    `<eos>` and stop words. `logit_bias` are words with what is added to their logits before all else. With each word
    come the `num_alternatives` words that the model held for the likeliest. Raises InvalidRequest, with the field, for
    values that make no sense.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    allow_unknown: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    random_start: bool = False
    logit_bias: tuple[tuple[str, float], ...] = ()
    num_alternatives: int = 0

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not 0 <= self.temperature <= _HOTTEST:
            raise _invalid("temperature", self.temperature, f"between 0 and {_HOTTEST:,.0f}")
        if self.top_k < 0:
            raise _invalid("top_k", self.top_k, "0 (all words) or above")
        if not 0 <= self.top_p <= 1:
            raise _invalid("top_p", self.top_p, "between 0 (all words) and 1")
        if not 0 <= self.min_p <= 1:
            raise _invalid("min_p", self.min_p, "between 0 (all words) and 1")
        if not 0.001 <= self.repetition_penalty <= 1000:
            raise _invalid("repetition_penalty", self.repetition_penalty, "between 0.001 and 1000; 1 is none")
        if not 0 <= self.seed < 2**64:
            raise _invalid("seed", self.seed, "between 0 and 2**64 - 1")
        if len(self.stop) > MAX_STOP_WORDS:
            raise InvalidRequest(f"{len(self.stop)} stop words; the limit is {MAX_STOP_WORDS}", field="sampling.stop")
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidRequest(
                f"{len(self.logit_bias):,} biases; the limit is {MAX_BIASES:,}", field="sampling.logit_bias"
            )
        for word, bias in self.logit_bias:
            if not -1000 <= bias <= 1000:
                raise _invalid("logit_bias", bias, f"between -1000 and 1000, for {word!r} too")
        if not 0 <= self.num_alternatives <= MAX_ALTERNATIVES:
            raise _invalid("num_alternatives", self.num_alternatives, f"between 0 and {MAX_ALTERNATIVES}")


def _invalid(field: str, value: float, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {value}; it must be {expected}", field=f"sampling.{field}")


def uniform(seed: int, position: int) -> float:
    """Return the random number, 0 ≤ u < 1, of the draw at `position` (from 0) of the sequence with `seed`."""
    numbers = _random_numbers(seed, position // _AT_ONCE)
    return (numbers[position % _AT_ONCE] >> 11) * 2.0**-53


# The generator costs as much for many numbers as for one: 30 µs of a token's 1,200.
@lru_cache(maxsize=1024)
def _random_numbers(seed: int, number: int) -> list[int]:
    generator = np.random.Philox(key=seed, counter=number * _AT_ONCE)
    # Each step of the counter gives four numbers; a draw takes the first.
    numbers: list[int] = generator.random_raw(4 * _AT_ONCE)[::4].tolist()
    return numbers


def draw(
    logits: Tensor,
    sampling: Sampling,
    position: int,
    masked_id: int | None = None,
    seen: TokenSet | None = None,
    bias: Mapping[int, float] | None = None,
) -> tuple[int, float]:
    """Draw one token from `logits` (V,); return its id and its log-probability in nats.

    The log-probability is the model's own: at temperature 1, over all tokens, without the penalty; NaN where the
    logits are no numbers. `masked_id` is never drawn (unless it is the whole vocabulary). `seen` are the tokens that
    the repetition penalty falls on; `bias` is added to the logits of its tokens.
    """
    own: Floats = logits.detach().float().cpu().numpy()
    largest = own.max()
    # Of NaN and infinity the largest is one of them.
    if not math.isfinite(largest):
        return 0, math.nan
    exponentials = own - largest
    np.exp(exponentials, out=exponentials)
    masked_id = masked_id if len(own) > 1 else None
    seen = seen if sampling.repetition_penalty != 1 else None
    masked = 0.0 if masked_id is None else float(exponentials[masked_id])
    if sampling.temperature == 1 and seen is None and not bias and masked < 1:
        # What most texts are drawn with: the exponentials are at hand already, and often their sums.
        if masked_id is not None:
            exponentials[masked_id] = 0
        cumulative = _cumulative(exponentials)
        kept = cut(exponentials, sampling)
        number = uniform(sampling.seed, position)
        token_id = _invert(kept, cumulative if kept is exponentials else _cumulative(kept), number)
        return token_id, _log(float(own[token_id] - largest), float(cumulative[-1]) + masked)
    token_id = _choose(_allowed(own, sampling, masked_id, seen, bias or {}), sampling, position)
    return token_id, _log(float(own[token_id] - largest), float(exponentials.sum(dtype=np.float64)))


def _log(own: float, total: float) -> float:
    """Return the log-probability of the logit `own`, where exp(logit) sum to `total`; NaN if those are no numbers."""
    return own - math.log(total) if total > 0 else math.nan


def draw_evenly(logits: Tensor, among: TokenSet, seed: int) -> tuple[int, float]:
    """Draw the first token of a text from `among`, each as likely; return what `draw` does. `logits` (V,)
    have no say.

    Raises InvalidRequest where there is none to draw.
    """
    if not among.any():
        raise InvalidRequest("there is no word to start with: all are stop words", field="sampling.random_start")
    evenly = among.astype(np.float32)
    token_id = _invert(evenly, _cumulative(evenly), uniform(seed, 0))
    own: Floats = logits.detach().float().cpu().numpy()
    largest = own.max()
    return token_id, _log(float(own[token_id] - largest), float(np.exp(own - largest).sum(dtype=np.float64)))


def _allowed(
    own: Floats, sampling: Sampling, masked_id: int | None, seen: TokenSet | None, bias: Mapping[int, float]
) -> Floats:
    """Return the logits that are drawn from: biased, those of `seen` penalised, that of `masked_id` -inf."""
    allowed = own.copy()
    for token_id, each in bias.items():
        allowed[token_id] += each
    if seen is not None:
        penalty, held = sampling.repetition_penalty, allowed[seen]
        allowed[seen] = np.where(held > 0, held / penalty, held * penalty)
    if masked_id is not None:
        allowed[masked_id] = -np.inf
    return allowed


def _choose(logits: Floats, sampling: Sampling, position: int) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    kept = weights(logits, sampling)
    return _invert(kept, _cumulative(kept), uniform(sampling.seed, position))


def likeliest(logits: Tensor, count: int) -> list[tuple[int, float]]:
    """Return the `count` likeliest tokens of `logits` (V,) with their log-probabilities in nats, best first.

    Of equally likely tokens the lower ids come first.
    """
    if not count:
        return []
    own: Floats = logits.detach().float().cpu().numpy()
    count = min(count, len(own))
    least = np.partition(own, len(own) - count)[len(own) - count]
    best = np.flatnonzero(own >= least)
    best = best[np.argsort(-own[best], kind="stable")][:count]
    total = math.log(float(np.exp(own - own.max()).sum(dtype=np.float64)))
    return [(int(each), float(own[each] - own.max()) - total) for each in best]


def weights(logits: Floats, sampling: Sampling) -> Floats:
    """Return the weights (V,), the largest 1, that tokens are drawn with: temperature, top_k, top_p, min_p."""
    # The largest is subtracted first, so that only the negligible overflow, to -inf.
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / np.float32(max(sampling.temperature, _COLDEST))
    return cut(np.exp(scaled), sampling)


def cut(weights: Floats, sampling: Sampling) -> Floats:
    """Return `weights` (V,) with 0 for the tokens that top_k, top_p and min_p leave out.

    top_p keeps the likeliest tokens until they hold that much of what top_k left; the one that passes the mark is
    kept. Of equally likely tokens at a cut, the lower ids stay.
    """
    if 0 < sampling.top_k < len(weights):
        weights = _likeliest(weights, sampling.top_k)
    if 0 < sampling.top_p < 1:
        weights = _nucleus(weights, sampling.top_p)
    if sampling.min_p:
        weights = np.where(weights >= sampling.min_p * weights.max(), weights, np.float32(0))
    return weights


def _nucleus(weights: Floats, top_p: float) -> Floats:
    """Keep the fewest tokens that hold `top_p` of the weight: where the last of them may be is halved, then sorted."""
    mark = top_p * float(weights.sum(dtype=np.float64))
    rest, held, num_held = weights, 0.0, 0
    while (half := len(rest) // 2) >= _SORTED:
        parted = np.partition(rest, half)
        in_upper = float(parted[half:].sum(dtype=np.float64))
        if held + in_upper >= mark:
            rest = parted[half:]
        else:
            rest, held, num_held = parted[:half], held + in_upper, num_held + len(rest) - half
    ordered = np.sort(rest)[::-1]
    last = int(np.searchsorted(held + ordered.cumsum(dtype=np.float64), mark))
    return _likeliest(weights, min(num_held + last + 1, len(weights)))


def _likeliest(weights: Floats, count: int) -> Floats:
    """Keep the `count` largest weights, 1 ≤ count ≤ V."""
    least = np.partition(weights, len(weights) - count)[len(weights) - count]
    kept = np.where(weights > least, weights, np.float32(0))
    ties = np.flatnonzero(weights == least)[: count - np.count_nonzero(kept)]
    kept[ties] = least
    return kept


def _cumulative(weights: Floats) -> NDArray[np.float64]:
    """Return the sum of `weights` (V,) up to the end of each block; a block is summed in float32, which is faster."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
    return sums.cumsum(dtype=np.float64)


def _invert(weights: Floats, cumulative: NDArray[np.float64], number: float) -> int:
    """Return the token whose slice of the cumulative distribution holds `number`, 0 ≤ number < 1."""
    target = number * cumulative[-1]
    block = int(np.searchsorted(cumulative, target, side="right"))
    first = block * _BLOCK
    within = weights[first : first + _BLOCK].cumsum(dtype=np.float64)
    before = cumulative[block - 1] if block else 0.0
    token_id = first + int(np.searchsorted(within, target - before, side="right"))
    # Rounding can lead past the last token of the block that has a weight.
    if token_id < min(first + _BLOCK, len(weights)) and weights[token_id] > 0:
        return token_id
    return int(np.flatnonzero(weights[: first + _BLOCK])[-1])
