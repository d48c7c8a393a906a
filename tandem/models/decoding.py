"""A text being written: the prompt through the network in pieces, then word after word.

The one decoder of the inference server and of `tandem generate --local`. It holds no clock, no socket and no device: a
caller says how much is to be done at once, and how the network is stepped.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from tandem.data.vocabulary import END, UNKNOWN, Vocabulary
from tandem.errors import CheckpointCorrupt, InvalidRequest
from tandem.models.sampling import Sampling, TokenSet, draw, draw_evenly

# A piece of the prompt holds the activations of all its tokens; in one piece, those of 65,536 would take gigabytes.
PREFILL_TOKENS = 256


class Stepper(Protocol):
    """A language model that is run a piece at a time."""

    def step(self, token_ids: list[int], state: Any) -> tuple[Tensor, Any]:
        """Return the logits float32 (V,) after the last of `token_ids` (one or more), and the state after them.

        `state` None is the start of a text. The state given is used up.
        """
        ...


class Sequence:
    """What the network remembers of a text, and what it says comes next.

    Raises InvalidRequest where a stop word is not one word of the vocabulary. `sum_log_probability` is that of the
    words drawn, in nats, under the model at temperature 1. Writing raises CheckpointCorrupt where the network's answers
    are no numbers.
    """

    def __init__(self, stepper: Stepper, vocabulary: Vocabulary, sampling: Sampling) -> None:
        self.num_words = 0
        self.sum_log_probability = 0.0
        self.stopped = False
        self._stepper, self._vocabulary, self._sampling = stepper, vocabulary, sampling
        self._stop_ids = frozenset(find_stop_id(vocabulary, word) for word in sampling.stop)
        self._masked_id = None if sampling.allow_unknown else vocabulary.unknown_id
        if self._masked_id in self._stop_ids:
            raise InvalidRequest(f"{UNKNOWN} is never drawn, and can't stop a text", field="sampling.stop")
        self._seen: TokenSet = np.zeros(len(vocabulary), bool)
        self._num_prompt_tokens = 0
        self._state: Any = None
        self._logits: Tensor | None = None
        # Drawn, but not yet read by the network: the last word of a text never needs to be.
        self._unread: int | None = None

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the text has ended, once it has."""
        return "stop" if self.stopped else "length"

    @property
    def mean_negative_log_probability(self) -> float:
        """In nats a word; 0 where there are none."""
        return -self.sum_log_probability / self.num_words if self.num_words else 0.0

    def pieces(self, prompt_ids: tuple[int, ...]) -> Iterator[Callable[[], None]]:
        """Yield what is to be called, in order, for the network to have read the prompt."""
        self._num_prompt_tokens = len(prompt_ids)
        self._seen[list(prompt_ids)] = True
        # A text begins as every line of the corpus does: after an end of line.
        token_ids = [self._vocabulary.end_id, *prompt_ids]
        for first in range(0, len(token_ids), PREFILL_TOKENS):
            yield lambda first=first: self._read(token_ids[first : first + PREFILL_TOKENS])  # type: ignore[misc]

    def write(self, max_words: int, go_on: Callable[[], bool] = lambda: True) -> list[str]:
        """Draw words, at least one and at most `max_words`, as long as `go_on()`; return them.

        Fewer, or none, where a stop word comes: then `stopped` is true, and there is no more to write.
        """
        words: list[str] = []
        while len(words) < max_words and (not words or go_on()):
            token_id = self._next()
            if token_id is None:
                break
            words.append(self._vocabulary.tokens[token_id])
        return words

    def _next(self) -> int | None:
        """Draw a word and return its id; None for a stop word."""
        if self._unread is not None:
            self._read([self._unread])
        assert self._logits is not None, "the prompt comes first"
        token_id, log_probability = self._draw(self._logits)
        if not math.isfinite(log_probability):
            num_read = self._num_prompt_tokens + self.num_words
            raise CheckpointCorrupt(f"the network's answers are not finite numbers after {num_read:,} words")
        if token_id in self._stop_ids:
            self.stopped = True
            return None
        self._unread = token_id
        self._seen[token_id] = True
        self.num_words += 1
        self.sum_log_probability += log_probability
        return token_id

    def _draw(self, logits: Tensor) -> tuple[int, float]:
        if self._sampling.random_start and self.num_words == 0:
            beginnings = np.ones(len(self._vocabulary), bool)
            beginnings[[self._vocabulary.end_id, *self._stop_ids]] = False
            if self._masked_id is not None:
                beginnings[self._masked_id] = False
            return draw_evenly(logits, beginnings, self._sampling.seed)
        return draw(logits, self._sampling, self.num_words, self._masked_id, self._seen)

    def _read(self, token_ids: list[int]) -> None:
        self._logits, self._state = self._stepper.step(token_ids, self._state)


def find_stop_id(vocabulary: Vocabulary, word: str) -> int:
    """Return the token id of the stop word `word`, which may be a line break; raise InvalidRequest if it has none."""
    if word in (END, "\n"):
        return vocabulary.end_id
    if not word.strip():
        raise InvalidRequest("a stop word is empty; give a word, or <eos>", field="sampling.stop")
    if vocabulary.tokenizer == "subword":
        # The same subword begins or ends other words: a text would stop in the middle of them.
        raise InvalidRequest(f"stop {word!r}: a model of subwords can stop at <eos> alone", field="sampling.stop")
    if word in vocabulary.ids:
        return vocabulary.ids[word]
    token_ids, unknown = vocabulary.encode(word)
    # A word that can never come would never stop the text: a mistake, not a wish.
    if unknown:
        raise InvalidRequest(f"stop word {word!r} is not in the model's vocabulary", field="sampling.stop")
    if len(token_ids) != 1:
        raise InvalidRequest(
            f"stop word {word!r} is {len(token_ids)} words to this model; give words one by one", field="sampling.stop"
        )
    return token_ids[0]
