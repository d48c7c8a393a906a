"""A text being written: the prompt through the network in pieces, then word after word.

The one decoder of the inference server, which steps many texts together (`tandem.models.slots`), and of `tandem
generate --local`, which has one. It holds no clock, no socket and no device: a caller says how much is to be done at
once, and how the network is stepped.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from tandem.data.vocabulary import END, UNKNOWN, Vocabulary
from tandem.errors import CheckpointCorrupt, InvalidRequest
from tandem.models.sampling import Sampling, TokenSet, draw, draw_evenly, likeliest

# A piece of the prompt holds the activations of all its tokens; in one piece, those of 65,536 would take gigabytes.
PREFILL_TOKENS = 256
# What a word of a request is for, as its errors say it.
_USES = {"stop": "stop word", "logit_bias": "word with a bias"}


class Stepper(Protocol):
    """A language model that is run a piece at a time."""

    def step(self, token_ids: list[int], state: Any) -> tuple[Tensor, Any]:
        """Return the logits float32 (V,) after the last of `token_ids` (one or more), and the state after them.

        `state` None is the start of a text. The state given is used up.
        """
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """A word of a text.

    `log_probability` is the model's own, in nats, at temperature 1 over all words; `alternatives` are the words that
    it held for the likeliest there, with their token ids and theirs, as many as were asked for, best first.
    """

    word: str
    log_probability: float
    alternatives: tuple[tuple[str, int, float], ...] = ()


class Text:
    """What has been drawn of a text, and how the next word is drawn. It knows no network.

    Raises InvalidRequest where a stop word, or one with a bias, is not one word of the vocabulary.
    `sum_log_probability` is that of the words drawn, in nats, under the model at temperature 1.
    """

    def __init__(self, vocabulary: Vocabulary, sampling: Sampling) -> None:
        self.num_words = 0
        self.sum_log_probability = 0.0
        self.stopped = False
        # What the network has yet to read before it says what comes next: of a text that has ended, its last word.
        self.unread: int | None = None
        self._vocabulary, self._sampling = vocabulary, sampling
        self._stop_ids = frozenset(find_token_id(vocabulary, word, "stop") for word in sampling.stop)
        self._bias = {find_token_id(vocabulary, word, "logit_bias"): bias for word, bias in sampling.logit_bias}
        self._masked_id = None if sampling.allow_unknown else vocabulary.unknown_id
        if self._masked_id in self._stop_ids:
            raise InvalidRequest(f"{UNKNOWN} is never drawn, and can't stop a text", field="sampling.stop")
        self._seen: TokenSet = np.zeros(len(vocabulary), bool)
        self._num_prompt_tokens = 0

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the text has ended, once it has."""
        return "stop" if self.stopped else "length"

    @property
    def mean_negative_log_probability(self) -> float:
        """In nats a word; 0 where there are none."""
        return -self.sum_log_probability / self.num_words if self.num_words else 0.0

    def begin(self, prompt_ids: tuple[int, ...]) -> list[int]:
        """Go on from a prompt; return what the network is to read, whose last token is `unread`."""
        self._num_prompt_tokens = len(prompt_ids)
        self._seen[list(prompt_ids)] = True
        # A text begins as every line of the corpus does: after an end of line.
        token_ids = [self._vocabulary.end_id, *prompt_ids]
        self.unread = token_ids[-1]
        return token_ids

    def draw(self, logits: Tensor) -> Drawn | None:
        """Draw the next word from `logits` (V,), what the network says after `unread`; None for a stop word.

        Raises CheckpointCorrupt where they are no numbers.
        """
        token_id, log_probability = self._choose(logits)
        if not math.isfinite(log_probability):
            num_read = self._num_prompt_tokens + self.num_words
            raise CheckpointCorrupt(f"the network's answers are not finite numbers after {num_read:,} words")
        if token_id in self._stop_ids:
            self.stopped = True
            return None
        self.unread = token_id
        self._seen[token_id] = True
        self.num_words += 1
        self.sum_log_probability += log_probability
        tokens = self._vocabulary.tokens
        ranked = likeliest(logits, self._sampling.num_alternatives)
        return Drawn(tokens[token_id], log_probability, tuple((tokens[each], each, its) for each, its in ranked))

    def _choose(self, logits: Tensor) -> tuple[int, float]:
        if self._sampling.random_start and self.num_words == 0:
            beginnings = np.ones(len(self._vocabulary), bool)
            beginnings[[self._vocabulary.end_id, *self._stop_ids]] = False
            if self._masked_id is not None:
                beginnings[self._masked_id] = False
            return draw_evenly(logits, beginnings, self._sampling.seed)
        return draw(logits, self._sampling, self.num_words, self._masked_id, self._seen, self._bias)


class Sequence:
    """A text and the one network that steps it. Raises what `Text` does."""

    def __init__(self, stepper: Stepper, vocabulary: Vocabulary, sampling: Sampling) -> None:
        self.text = Text(vocabulary, sampling)
        self._stepper = stepper
        self._state: Any = None
        # What the network says after the last word, where that has been read.
        self._logits: Tensor | None = None

    def pieces(self, prompt_ids: tuple[int, ...]) -> Iterator[Callable[[], None]]:
        """Yield what is to be called, in order, for the network to have read the prompt."""
        token_ids = self.text.begin(prompt_ids)
        for first in range(0, len(token_ids), PREFILL_TOKENS):
            yield lambda first=first: self._read(token_ids[first : first + PREFILL_TOKENS])  # type: ignore[misc]

    def write(self, max_words: int, go_on: Callable[[], bool] = lambda: True) -> list[Drawn]:
        """Draw words, at least one and at most `max_words`, as long as `go_on()`; return them.

        Fewer, or none, where a stop word comes: then `text.stopped` is true, and there is no more to write.
        """
        words: list[Drawn] = []
        while len(words) < max_words and (not words or go_on()):
            drawn = self._next()
            if drawn is None:
                break
            words.append(drawn)
        return words

    def _next(self) -> Drawn | None:
        if self._logits is None:
            assert self.text.unread is not None, "the prompt comes first"
            self._read([self.text.unread])
        assert self._logits is not None
        logits, self._logits = self._logits, None
        return self.text.draw(logits)

    def _read(self, token_ids: list[int]) -> None:
        self._logits, self._state = self._stepper.step(token_ids, self._state)


def find_token_id(vocabulary: Vocabulary, word: str, use: Literal["stop", "logit_bias"]) -> int:
    """Return the token id of `word`, which may be a line break, for `use`; raise InvalidRequest if it has none."""
    field, what = f"sampling.{use}", _USES[use]
    if word in (END, "\n"):
        return vocabulary.end_id
    if not word.strip():
        raise InvalidRequest(f"a {what} is empty; give a word, or <eos>", field=field)
    if vocabulary.tokenizer == "subword":
        # The same subword begins or ends other words: a text would stop in the middle of them.
        raise InvalidRequest(f"{use} {word!r}: a model of subwords takes <eos> alone", field=field)
    if word in vocabulary.ids:
        return vocabulary.ids[word]
    token_ids, unknown = vocabulary.encode(word)
    # A word that can never come would never stop the text: a mistake, not a wish.
    if unknown:
        raise InvalidRequest(f"{what} {word!r} is not in the model's vocabulary", field=field)
    if len(token_ids) != 1:
        raise InvalidRequest(
            f"{what} {word!r} is {len(token_ids)} words to this model; give words one by one", field=field
        )
    return token_ids[0]
