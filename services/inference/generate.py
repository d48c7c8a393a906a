"""Generate: a prompt read in pieces, then word after word, together with the texts of all other callers."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from copy import deepcopy
from dataclasses import replace
from functools import partial

from services.inference.engine import Engine
from services.inference.loading import as_language_model, version_of
from services.inference.scheduler import Priority
from tandem.comparison.results import Timings
from tandem.data.detokenize import Detokenizer
from tandem.data.vocabulary import Vocabulary
from tandem.generation.pieces import make_piece
from tandem.generation.prompts import Prompt, check_max_words, check_num_texts, check_prompt, read_prompt
from tandem.models.decoding import Text
from tandem.models.sampling import Sampling
from tandem.wire.results import GenerationSummary, TextPiece

# Characters, times texts: some 50 µs.
_SHORT_PROMPT = 500


async def generate(
    engine: Engine,
    reference: str,
    prompt: str | None,
    max_words: int,
    sampling: Sampling,
    deadline: float | None,
    priority: Priority = Priority.NORMAL,
    num_texts: int = 1,
) -> AsyncGenerator[TextPiece | GenerationSummary, None]:
    """Yield the text as it is drawn, then the summary. Every drawn token counts as a word, `<eos>` too.

    `num_texts` texts, with the seeds from that of `sampling` on, come interleaved; each has its index and its summary.
    """
    max_words, num_texts = check_max_words(max_words), check_num_texts(num_texts)
    check_prompt(prompt, sampling.random_start)
    model = as_language_model(await engine.models.get(reference))
    samplings = [replace(sampling, seed=(sampling.seed + index) % 2**64) for index in range(num_texts)]
    begin = partial(_begin, model.vocabulary, prompt, samplings)
    # A prompt of a megabyte takes a tenth of a second: in a thread, or all other calls would wait. A short one takes
    # less than the way there and back.
    is_short = len(prompt or "") * num_texts <= _SHORT_PROMPT
    read, writers, texts, token_ids = begin() if is_short else await asyncio.to_thread(begin)
    scheduler, model = engine.devices.choose(model, priority)
    assert model.texts is not None, "a model is served when it is on its device"
    with scheduler.admit(num_texts, model.runtime, deadline=deadline, priority=priority, stream=True) as place:
        async with aclosing(model.texts.write(texts, token_ids, max_words, place)) as steps:
            async for news in steps:
                if news.drawn:
                    yield make_piece(news.drawn, writers[news.index], news.index)
                if news.ended:
                    text = texts[news.index]
                    yield GenerationSummary(
                        model=version_of(model),
                        num_prompt_tokens=len(read.token_ids),
                        num_words=text.num_words,
                        seed=samplings[news.index].seed,
                        finish_reason=text.finish_reason,
                        unknown_words=read.unknown_words,
                        mean_negative_log_probability=text.mean_negative_log_probability,
                        timings=Timings(queue_ms=news.queue_ms, compute_ms=news.compute_ms),
                        text_index=news.index,
                    )


def _begin(
    vocabulary: Vocabulary, prompt: str | None, samplings: Sequence[Sampling]
) -> tuple[Prompt, list[Detokenizer], list[Text], list[int]]:
    """Return the prompt, what renders each text, the texts, and the tokens that all of them begin with."""
    read, writer = read_prompt(vocabulary, prompt)
    texts = [Text(vocabulary, sampling) for sampling in samplings]
    token_ids = [text.begin(read.token_ids) for text in texts]
    return read, [deepcopy(writer) for _ in texts], texts, token_ids[0]
