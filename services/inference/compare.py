"""Compare: the same decoded pixels through two classifiers at one batch size in float32, then paired statistics.

Classes are matched by their ids, so the two models may order them differently or know different ones.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

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
from services.inference.scheduler import MAX_BATCH, DeviceScheduler, Place, Priority
from services.inference.tally import Tally, check_common_class
from tandem.comparison.results import Comparison, ComparisonSummary, PairResult, ScoredClass, Timings
from tandem.comparison.weighing import TOP_K, Predictions
from tandem.data.manifest import ImageDataset, read_dataset, read_index, spread
from tandem.errors import DatasetNotFound, InvalidReference, InvalidRequest
from tandem.names import check_name
from tandem.wire.results import ComparisonProgress

PROGRESS_IMAGES = 256
PROGRESS_INTERVAL_S = 1.0
DEFAULT_SPLIT = "val"


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
    scheduler, pair = await _both(engine, model_a, model_b, priority)
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
        batch = await _decode(engine, pair, sources, PixelBudget())
        named = [(image.name, image.label) for image in images]
        tally = Tally(pair.a, pair.b)
        results, timings = await _predict(place, pair, tally, batch, named, top_k)
    return Comparison(tuple(results), await asyncio.to_thread(tally.summary), timings)


@dataclass(frozen=True)
class DatasetStep:
    """What CompareDataset says from time to time: how far it is, and what it found since; in the end the summary."""

    progress: ComparisonProgress
    found: tuple[PairResult, ...] = ()
    summary: ComparisonSummary | None = None
    timings: Timings = field(default_factory=Timings)


async def compare_dataset(
    engine: Engine,
    model_a: str,
    model_b: str,
    dataset: str,
    split: str,
    top_k: int,
    limit: int,
    deadline: float | None,
    priority: Priority = Priority.NORMAL,
) -> AsyncGenerator[DatasetStep, None]:
    """Compare on a split of a dataset; yield progress about each second, and the summary last."""
    top_k = check_top_k(top_k, PROGRESS_IMAGES)
    files = await asyncio.to_thread(_split_files, engine, dataset, split or DEFAULT_SPLIT, limit)
    scheduler, pair = await _both(engine, model_a, model_b, priority)
    tally, timings, found = Tally(pair.a, pair.b), Timings(), list[PairResult]()
    said_at, said = time.monotonic(), 0
    # Admitted once: a comparison that has begun is not refused half way.
    runtimes = pair.a.runtime, pair.b.runtime
    with scheduler.admit(MAX_BATCH, *runtimes, deadline=deadline, priority=priority, stream=True) as place:
        yield DatasetStep(ComparisonProgress(0, len(files)))
        for first in range(0, len(files), MAX_BATCH):
            chunk = files[first : first + MAX_BATCH]
            batch = await _decode(engine, pair, [path.read_bytes for path, _, _ in chunk])
            named = [(name, label) for _, name, label in chunk]
            results, took = await _predict(place, pair, tally, batch, named, top_k)
            timings += took
            found += [result for result in results if result.error or not result.agree]
            num_done = first + len(chunk)
            if num_done - said >= PROGRESS_IMAGES or time.monotonic() - said_at >= PROGRESS_INTERVAL_S:
                yield DatasetStep(ComparisonProgress(num_done, len(files)), tuple(found))
                said_at, said, found = time.monotonic(), num_done, []
    summary = await asyncio.to_thread(tally.summary)
    yield DatasetStep(ComparisonProgress(len(files), len(files)), tuple(found), summary, timings)


async def _both(engine: Engine, model_a: str, model_b: str, priority: Priority) -> tuple[DeviceScheduler, Pair]:
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


def _split_files(engine: Engine, dataset: str, split: str, limit: int) -> list[tuple[Path, str, str]]:
    """Return (path, file name, class id) of `limit` (0: all) images of a split, spread evenly over its classes."""
    check_name(split, "split")
    if limit < 0:
        raise InvalidRequest(f"limit is {limit}; it must be 1 or above, or 0 for all images", field="limit")
    manifest = read_dataset(engine.volume, dataset)
    if not isinstance(manifest, ImageDataset):
        raise InvalidRequest(f"dataset {dataset!r} holds text; comparing classifiers needs images", field="dataset")
    directory = engine.volume.dataset(dataset)
    index = read_index(directory, split)
    rows = [index[place] for place in spread(len(index), limit or None)]
    if not rows:
        raise DatasetNotFound(f"split {split!r} of dataset {dataset!r} has no images")
    return [(directory / file, file, manifest.classes[label].id) for file, label in rows]


async def _decode(engine: Engine, pair: Pair, sources: Sequence[Source], budget: PixelBudget | None = None) -> Batch:
    return await engine.decoder.decode(sources, [pair.a.card.preprocessing, pair.b.card.preprocessing], budget)


async def _predict(
    place: Place, pair: Pair, tally: Tally, batch: Batch, named: Sequence[tuple[str, str]], top_k: int
) -> tuple[list[PairResult], Timings]:
    """Return a result for each `(name, label)`, errors included, and record them."""
    results = [PairResult(name, label, error=error) for (name, label), error in zip(named, batch.errors, strict=True)]
    tally.num_errors += len(named) - len(batch.indices)
    timings = Timings(decode_ms=batch.decode_ms)
    if not batch.indices:
        return results, timings
    logits: list[Tensor] = []
    for model, pixels in zip((pair.a, pair.b), batch.pixels, strict=True):
        # In batches of its own, so that both models see the same ones, whatever else is asked of them.
        done = await place.predict(model.runtime, pixels)
        timings += Timings(queue_ms=done.queue_ms, compute_ms=done.compute_ms)
        logits.append(done.value)
    given = [named[index] for index in batch.indices]
    # Not on the loop: of a batch of 32 with 200 classes it takes a millisecond.
    told = await asyncio.to_thread(_pairs, pair, tally, logits, given, top_k)
    for index, result in zip(batch.indices, told, strict=True):
        results[index] = result
    return results, timings


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
