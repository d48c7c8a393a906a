"""Generate: a prompt through the network in pieces, then word after word, told as they come.

Each sequence is stepped for a short time in its turn on the device's thread, so that several texts and the calls of
classifiers share it. A slow reader holds up none but itself: its next turn is asked for when its last words are gone.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from torch import Tensor

from services.inference.engine import Engine
from services.inference.loading import ServedLanguageModel, as_language_model, version_of
from tandem.comparison.results import Timings
from tandem.data.detokenize import Detokenizer
from tandem.errors import InvalidPrompt, InvalidRequest
from tandem.models.language_models import ModelState
from tandem.models.sampling import Sampling, draw
from tandem.wire.limits import DEFAULT_WORDS, MAX_PROMPT_BYTES, MAX_PROMPT_WORDS, MAX_WORDS
from tandem.wire.results import GenerationSummary, TextPiece

# A piece of the prompt computes the logits of all its tokens: 256 × 33,278 words are 34 MB.
PREFILL_TOKENS = 256
# How long a sequence holds the device in one turn, and how many words it may tell at once.
TURN_S = 0.05
TURN_WORDS = 64


@dataclass(frozen=True)
class Prompt:
    """What a text goes on from; `words` the vocabulary lacks became `<unk>`."""

    token_ids: tuple[int, ...]
    unknown_words: tuple[str, ...]


@dataclass
class Sequence:
    """A text being written: what the network remembers, and what it says comes next."""

    model: ServedLanguageModel
    sampling: Sampling
    num_words: int = 0
    sum_log_probability: float = 0.0
    _state: ModelState | None = None
    _logits: Tensor | None = field(default=None, repr=False)
    # Drawn, but not yet read by the network: the last word of a text never needs to be.
    _unread: int | None = None

    def read(self, token_ids: list[int]) -> None:
        """Take in tokens, one or more."""
        self._logits, self._state = self.model.runtime.step(token_ids, self._state)

    def write(self, max_words: int, turn_s: float = TURN_S) -> list[str]:
        """Draw words, at least one and at most `max_words`, until `turn_s` are over; return them."""
        vocabulary = self.model.vocabulary
        masked_id = None if self.sampling.allow_unknown else vocabulary.unknown_id
        words: list[str] = []
        ends_at = time.monotonic() + turn_s
        while len(words) < max_words and (not words or time.monotonic() < ends_at):
            if self._unread is not None:
                self.read([self._unread])
            assert self._logits is not None, "the prompt comes first"
            token_id, log_probability = draw(self._logits, self.sampling, self.num_words, masked_id)
            self.num_words += 1
            self.sum_log_probability += log_probability
            words.append(vocabulary.tokens[token_id])
            self._unread = token_id
        return words


async def generate(
    engine: Engine, reference: str, prompt: str | None, max_words: int, sampling: Sampling, deadline: float | None
) -> AsyncGenerator[TextPiece | GenerationSummary, None]:
    """Yield the text as it is drawn, then the summary. Every drawn token counts as a word, `<eos>` too."""
    max_words = check_max_words(max_words)
    _check_prompt(prompt)
    model = as_language_model(await engine.models.get(reference))
    # A prompt of a megabyte takes a tenth of a second: in a thread, or all other calls would wait.
    read, writer = await asyncio.to_thread(_encode, model, prompt)
    sequence, timings = Sequence(model, sampling), Timings()
    with engine.scheduler.admit(1):
        # A text begins as every line of the corpus does: after an end of line.
        token_ids = [model.vocabulary.end_id, *read.token_ids]
        for first in range(0, len(token_ids), PREFILL_TOKENS):
            piece = token_ids[first : first + PREFILL_TOKENS]
            done = await engine.scheduler.run(lambda piece=piece: sequence.read(piece), deadline)  # type: ignore[misc]
            timings += Timings(queue_ms=done.queue_ms, compute_ms=done.compute_ms)
        while sequence.num_words < max_words:
            # The first word is told at once; a reader sees that it works.
            room = min(max_words - sequence.num_words, TURN_WORDS) if sequence.num_words else 1
            told = await engine.scheduler.run(lambda room=room: sequence.write(room), deadline)  # type: ignore[misc]
            timings += Timings(queue_ms=told.queue_ms, compute_ms=told.compute_ms)
            yield TextPiece(*writer.tell(told.value))
    yield GenerationSummary(
        model=version_of(model),
        num_prompt_tokens=len(read.token_ids),
        num_words=sequence.num_words,
        seed=sampling.seed,
        finish_reason="length",
        unknown_words=read.unknown_words,
        mean_negative_log_probability=-sequence.sum_log_probability / sequence.num_words,
        timings=timings,
    )


def check_max_words(max_words: int) -> int:
    """Return `max_words`, or the default for 0; raise InvalidRequest outside the limits."""
    if not 0 <= max_words <= MAX_WORDS:
        raise InvalidRequest(
            f"max_words is {max_words}; it must be between 1 and {MAX_WORDS:,}, or 0 for {DEFAULT_WORDS}",
            field="sampling.max_words",
        )
    return max_words or DEFAULT_WORDS


def pick_seed() -> int:
    """Return a seed for who gave none: 32 bits, so that it can be typed and survives any JSON."""
    return secrets.randbits(32)


def _check_prompt(prompt: str | None) -> None:
    if prompt is None:
        return
    # Counted in characters first: those of a message full of them need not be encoded to be too many.
    if len(prompt) > MAX_PROMPT_BYTES or len(prompt.encode()) > MAX_PROMPT_BYTES:
        raise InvalidPrompt(f"the prompt is too long; the limit is {MAX_PROMPT_BYTES:,} bytes", field="prompt")
    if not prompt.strip():
        raise InvalidPrompt("the prompt is empty: give it words, or leave it out to start a new line", field="prompt")


def _encode(model: ServedLanguageModel, prompt: str | None) -> tuple[Prompt, Detokenizer]:
    tokenizer = model.vocabulary.tokenizer
    if prompt is None:
        return Prompt((), ()), Detokenizer(tokenizer)
    token_ids, unknown = model.vocabulary.encode(prompt)
    if len(token_ids) > MAX_PROMPT_WORDS:
        raise InvalidPrompt(
            f"the prompt has {len(token_ids):,} words; the limit is {MAX_PROMPT_WORDS:,}", field="prompt"
        )
    return Prompt(tuple(token_ids), tuple(dict.fromkeys(unknown))), Detokenizer(tokenizer, prompt)
