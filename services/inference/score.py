"""Score: given texts through a language model in pieces, and what it makes of each token.

A text begins as a generated one does, after `<eos>`, so that Score says of its words what Generate said of them. Each
is read by itself: its numbers depend on no other.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from services.inference.classify import off_the_loop
from services.inference.engine import Engine
from services.inference.loading import ServedLanguageModel, as_language_model, version_of
from services.inference.scheduler import Place, Priority
from tandem.comparison.results import Timings
from tandem.data.detokenize import Detokenizer
from tandem.data.vocabulary import Vocabulary
from tandem.errors import CheckpointCorrupt, InvalidRequest
from tandem.generation.prompts import check_text
from tandem.models.scoring import ScoredPiece
from tandem.wire.limits import (
    MAX_ALTERNATIVES,
    MAX_ANSWERS,
    MAX_SCORE_BYTES,
    MAX_SCORE_TEXTS,
    MAX_SCORE_TOKENS,
)
from tandem.wire.results import Alternative, Scoring, TextScore, TokenScore

# What a token, and each of its alternatives, holds until the answer is written: a name, an id, a number.
_TOKEN_BYTES = 200


@dataclass(frozen=True)
class ReadText:
    """A text in token ids, of which the first is given; `unknown_words` the vocabulary lacks."""

    token_ids: tuple[int, ...]
    unknown_words: tuple[str, ...]


async def score(
    engine: Engine,
    reference: str,
    texts: Sequence[str],
    num_alternatives: int,
    first_is_given: bool,
    deadline: float | None,
    priority: Priority = Priority.NORMAL,
) -> Scoring:
    """Return the log-probability of each token of `texts`, with the `num_alternatives` likeliest in its place."""
    check_texts(texts)
    check_alternatives(num_alternatives)
    model = as_language_model(await engine.models.get(reference))
    read = await asyncio.to_thread(read_texts, model.vocabulary, texts, num_alternatives, first_is_given)
    timings, results = Timings(), list[TextScore]()
    scheduler, model = engine.devices.choose(model, priority)
    admitted = scheduler.admit(
        len(read),
        model.runtime,
        num_bytes=_TOKEN_BYTES * (1 + num_alternatives) * sum(len(text.token_ids) for text in read),
        deadline=deadline,
        priority=priority,
    )
    with admitted as place:
        for text in read:
            pieces, took = await _pieces(place, model, text, num_alternatives)
            timings += took
            num_scored = (len(text.token_ids) - 1) * (1 + num_alternatives)
            results.append(await off_the_loop(num_scored, partial(_told, model, text, pieces)))
    return Scoring(version_of(model), tuple(results), timings)


def check_texts(texts: Sequence[str]) -> None:
    """Raise InvalidRequest if there are no texts or too many, or too many bytes in all."""
    if not texts:
        raise InvalidRequest("there are no texts in the request", field="texts")
    if len(texts) > MAX_SCORE_TEXTS:
        raise InvalidRequest(f"{len(texts):,} texts in a message; the limit is {MAX_SCORE_TEXTS}", field="texts")
    for number, text in enumerate(texts):
        check_text(text, f"texts[{number}]")
    if sum(len(text.encode()) for text in texts) > MAX_SCORE_BYTES:
        raise InvalidRequest(f"the texts are too long; the limit is {MAX_SCORE_BYTES:,} bytes in all", field="texts")


def check_alternatives(num_alternatives: int) -> None:
    """Raise InvalidRequest for a number of alternatives outside the limits."""
    if not 0 <= num_alternatives <= MAX_ALTERNATIVES:
        raise InvalidRequest(
            f"num_alternatives is {num_alternatives}; it must be between 0 and {MAX_ALTERNATIVES}",
            field="num_alternatives",
        )


def read_texts(
    vocabulary: Vocabulary, texts: Sequence[str], num_alternatives: int, first_is_given: bool
) -> list[ReadText]:
    """Return the texts in token ids; raise InvalidRequest for one without a token to score, or for too many in all."""
    read = [_read(vocabulary, text, f"texts[{number}]", first_is_given) for number, text in enumerate(texts)]
    num_tokens = sum(len(text.token_ids) - 1 for text in read)
    if num_tokens > MAX_SCORE_TOKENS:
        raise InvalidRequest(
            f"the texts have {num_tokens:,} tokens; the limit is {MAX_SCORE_TOKENS:,} in a message", field="texts"
        )
    if num_tokens * num_alternatives > MAX_ANSWERS:
        raise InvalidRequest(
            f"{num_alternatives} alternatives for {num_tokens:,} tokens make {num_tokens * num_alternatives:,}; the "
            f"limit is {MAX_ANSWERS:,} in a message",
            field="num_alternatives",
        )
    return read


def _read(vocabulary: Vocabulary, text: str, field: str, first_is_given: bool) -> ReadText:
    token_ids, unknown = vocabulary.encode(text)
    if len(token_ids) <= first_is_given:
        given = " after the first, which is given" if first_is_given else ""
        raise InvalidRequest(f"{field} has no word of the model's vocabulary{given}: nothing to score", field=field)
    start = () if first_is_given else (vocabulary.end_id,)
    return ReadText((*start, *token_ids), tuple(dict.fromkeys(unknown)))


async def _pieces(
    place: Place, model: ServedLanguageModel, text: ReadText, num_alternatives: int
) -> tuple[list[ScoredPiece], Timings]:
    pieces, timings = list[ScoredPiece](), Timings()
    for reading in model.scorer.reading(text.token_ids, num_alternatives):
        done = await place.run(reading.step, model.runtime)
        timings += Timings(queue_ms=done.queue_ms, compute_ms=done.compute_ms)
        pieces.append(done.value)
    return pieces, timings


def _told(model: ServedLanguageModel, text: ReadText, pieces: Sequence[ScoredPiece]) -> TextScore:
    vocabulary = model.vocabulary
    token_ids = text.token_ids[1:]
    _, names = Detokenizer(vocabulary.tokenizer).tell(vocabulary.tokens[token_id] for token_id in token_ids)
    log_probabilities = [value for piece in pieces for value in piece.log_probabilities.tolist()]
    if not all(map(math.isfinite, log_probabilities)):
        raise CheckpointCorrupt(f"{model.located.label} gives a token a probability that is no number")
    alternatives = [row for piece in pieces for row in _alternatives(vocabulary, piece)]
    tokens = map(TokenScore, names, token_ids, log_probabilities, alternatives)
    num_unknown = token_ids.count(vocabulary.unknown_id) if vocabulary.unknown_id is not None else 0
    return TextScore(tuple(tokens), text.unknown_words, num_unknown)


def _alternatives(vocabulary: Vocabulary, piece: ScoredPiece) -> list[tuple[Alternative, ...]]:
    writer = Detokenizer(vocabulary.tokenizer)
    return [
        tuple(
            Alternative(writer.name(vocabulary.tokens[token_id]), token_id, value)
            for token_id, value in zip(*row, strict=True)
        )
        for row in zip(piece.alternative_ids.tolist(), piece.alternatives.tolist(), strict=True)
    ]
