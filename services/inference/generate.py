"""Generate: a prompt through the network in pieces, then word after word, told as they come.

Each sequence is stepped for a short time in its turn on the device's thread, so that several texts and the calls of
classifiers share it. A slow reader holds up none but itself: its next turn is asked for when its last words are gone.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from services.inference.engine import Engine
from services.inference.loading import as_language_model, version_of
from tandem.comparison.results import Timings
from tandem.generation.prompts import check_max_words, check_prompt, read_prompt
from tandem.models.decoding import Sequence
from tandem.models.sampling import Sampling
from tandem.wire.results import GenerationSummary, TextPiece

# How long a sequence holds the device in one turn, and how many words it may tell at once.
TURN_S = 0.05
TURN_WORDS = 64


async def generate(
    engine: Engine, reference: str, prompt: str | None, max_words: int, sampling: Sampling, deadline: float | None
) -> AsyncGenerator[TextPiece | GenerationSummary, None]:
    """Yield the text as it is drawn, then the summary. Every drawn token counts as a word, `<eos>` too."""
    max_words = check_max_words(max_words)
    check_prompt(prompt, sampling.random_start)
    model = as_language_model(await engine.models.get(reference))
    # A prompt of a megabyte takes a tenth of a second: in a thread, or all other calls would wait.
    read, writer = await asyncio.to_thread(read_prompt, model.vocabulary, prompt)
    sequence, timings = Sequence(model.runtime, model.vocabulary, sampling), Timings()
    with engine.scheduler.admit(1):
        for piece in sequence.pieces(read.token_ids):
            done = await engine.scheduler.run(piece, deadline)
            timings += Timings(queue_ms=done.queue_ms, compute_ms=done.compute_ms)
        while sequence.num_words < max_words and not sequence.stopped:
            # The first word is told at once; a reader sees that it works.
            room = min(max_words - sequence.num_words, TURN_WORDS) if sequence.num_words else 1
            told = await engine.scheduler.run(_turn(sequence, room), deadline)
            timings += Timings(queue_ms=told.queue_ms, compute_ms=told.compute_ms)
            if told.value:
                yield TextPiece(*writer.tell(told.value))
    yield GenerationSummary(
        model=version_of(model),
        num_prompt_tokens=len(read.token_ids),
        num_words=sequence.num_words,
        seed=sampling.seed,
        finish_reason=sequence.finish_reason,
        unknown_words=read.unknown_words,
        mean_negative_log_probability=sequence.mean_negative_log_probability,
        timings=timings,
    )


def _turn(sequence: Sequence, max_words: int) -> Callable[[], list[str]]:
    """Return what writes at most `max_words`, until TURN_S are over; the clock starts with the call."""

    def write() -> list[str]:
        ends_at = time.monotonic() + TURN_S
        return sequence.write(max_words, lambda: time.monotonic() < ends_at)

    return write
