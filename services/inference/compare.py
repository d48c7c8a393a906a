"""Compare: the same decoded pixels through two classifiers at one batch size in float32, then paired statistics.

Classes are matched by their ids, so the two models may order them differently or know different ones.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from services.inference.calls import Ranked, rank
from services.inference.classify import (
    GivenImage,
    check_images,
    check_top_k,
    num_bytes,
)
from services.inference.classify import named as names
from services.inference.decoding import Batch, PixelBudget, Source
from services.inference.engine import Engine
from services.inference.loading import ServedClassifier, as_classifier
from services.inference.scheduler import DeviceScheduler, Place, Priority
from services.inference.tally import Tally, check_common_class
from tandem.comparison.results import Comparison, PairResult, ScoredClass, Timings
from tandem.comparison.weighing import TOP_K, Predictions
from tandem.errors import InvalidReference


@dataclass(frozen=True)
class Pair:
    """The two models of a comparison."""

    a: ServedClassifier
    b: ServedClassifier


async def compare(
    engine: Engine,
    model_a: str,
    model_b: str,
    images: Sequence[GivenImage],
    top_k: int,
    deadline: float | None,
    priority: Priority = Priority.NORMAL,
) -> Comparison:
    """Return what two classifiers say of each image, and where they agree."""
    top_k = check_top_k(top_k, len(images))
    check_images(images)
    scheduler, pair = await both_models(engine, model_a, model_b, priority)
    preprocessings = pair.a.card.preprocessing, pair.b.card.preprocessing
    admitted = scheduler.admit(
        len(images),
        pair.a.runtime,
        pair.b.runtime,
        num_bytes=num_bytes(images, *preprocessings),
        deadline=deadline,
        priority=priority,
    )
    with admitted as place:
        sources = [lambda image=image: image.data for image in images]
        computed = await compute(place, pair, await decode(engine, pair, sources, priority, PixelBudget()))
        named = [(image.name, image.label) for image in images]
        tally = Tally(pair.a, pair.b)
        # Not on the loop: of a batch of 32 with 200 classes it takes a millisecond.
        results = await asyncio.to_thread(weigh, pair, tally, computed, named, top_k)
    return Comparison(tuple(results), await asyncio.to_thread(tally.summary), computed.timings)


async def both_models(engine: Engine, model_a: str, model_b: str, priority: Priority) -> tuple[DeviceScheduler, Pair]:
    """Return both models on one device, and its scheduler."""
    a = await _classifier(engine, model_a, "model_a")
    # Or this call would hold the one, and wait for the room of the other.
    with _names("model_b"):
        await engine.models.check_fits(a, model_b)
    b = await _classifier(engine, model_b, "model_b")
    check_common_class(a, b, "model_b")
    pairs = [Pair(one.in_float32(), other.in_float32()) for one, other in zip(a.everywhere, b.everywhere, strict=True)]
    number = engine.devices.pick([(pair.a.runtime, pair.b.runtime) for pair in pairs], priority)
    return engine.devices[number], pairs[number]


async def _classifier(engine: Engine, reference: str, field: str) -> ServedClassifier:
    with _names(field):
        return as_classifier(await engine.models.get(reference), field)


@contextmanager
def _names(field: str) -> Iterator[None]:
    try:
        yield
    except InvalidReference as error:
        raise InvalidReference(str(error), field=field) from None


async def decode(
    engine: Engine, pair: Pair, sources: Sequence[Source], priority: Priority, budget: PixelBudget | None = None
) -> Batch:
    """Return the images as both models want them."""
    return await engine.decoder.decode(
        sources, [pair.a.card.preprocessing, pair.b.card.preprocessing], budget, priority
    )


@dataclass(frozen=True)
class Computed:
    """The logits of both models, (N, Ca) and (N, Cb), for the N images of a batch that could be decoded."""

    batch: Batch
    logits: tuple[Tensor, ...]
    timings: Timings


async def compute(place: Place, pair: Pair, batch: Batch) -> Computed:
    """Run both models on a batch."""
    timings, logits = Timings(decode_ms=batch.decode_ms), list[Tensor]()
    for model, pixels in zip((pair.a, pair.b), batch.pixels, strict=True) if batch.indices else ():
        # In batches of its own, so that both models see the same ones, whatever else is asked of them.
        done = await place.predict(model.runtime, pixels)
        timings += Timings(queue_ms=done.queue_ms, compute_ms=done.compute_ms)
        logits.append(done.value)
    return Computed(batch, tuple(logits), timings)


def weigh(
    pair: Pair, tally: Tally, computed: Computed, named: Sequence[tuple[str, str]], top_k: int
) -> list[PairResult]:
    """Record a batch, and return a result for each `(name, label)` of it, errors included."""
    batch = computed.batch
    results = [PairResult(name, label, error=error) for (name, label), error in zip(named, batch.errors, strict=True)]
    tally.num_errors += len(named) - len(batch.indices)
    if batch.indices:
        told = _pairs(pair, tally, computed.logits, [named[index] for index in batch.indices], top_k)
        for index, result in zip(batch.indices, told, strict=True):
            results[index] = result
    return results


def _pairs(
    pair: Pair, tally: Tally, logits: Sequence[Tensor], named: Sequence[tuple[str, str]], top_k: int
) -> list[PairResult]:
    """Record logits (N, Ca) and (N, Cb) of N images, and return their results."""
    ranked = [rank(each, max(top_k, TOP_K)) for each in logits]
    of_a, of_b = (
        Predictions(each.softmax(1).numpy(), best.indices.numpy()) for each, best in zip(logits, ranked, strict=True)
    )
    apart = tally.add(of_a, of_b, [label for _, label in named])
    best = (
        names(Ranked(each.probabilities[:, :top_k], each.indices[:, :top_k]), model.card.classes)
        for each, model in zip(ranked, (pair.a, pair.b), strict=True)
    )
    return [
        PairResult(name, label, one, other, agree=_agree(one, other), divergence=divergence)
        for (name, label), one, other, divergence in zip(named, *best, apart, strict=True)
    ]


def _agree(a: tuple[ScoredClass, ...], b: tuple[ScoredClass, ...]) -> bool:
    return a[0].id == b[0].id
