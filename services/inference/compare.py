"""Compare: the same decoded pixels through two classifiers at one batch size in float32, then paired statistics.

Classes are matched by their ids, so the two models may order them differently or know different ones.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from services.inference.classify import (
    GivenImage,
    best_classes,
    check_images,
    check_top_k,
    num_bytes,
    off_the_loop,
)
from services.inference.decoding import Batch, PixelBudget, Source
from services.inference.engine import Engine
from services.inference.loading import ServedClassifier, as_classifier, version_of
from services.inference.scheduler import MAX_BATCH, DeviceScheduler, Place, Priority
from tandem.comparison.paired import PairedTable, tabulate
from tandem.comparison.results import Comparison, ComparisonSummary, PairResult, ScoredClass, Timings
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


@dataclass
class Tally:
    """Counts results as they come; nothing but the table of right and wrong is kept."""

    pair: Pair
    num_images: int = 0
    num_disagreements: int = 0
    num_errors: int = 0
    table: PairedTable = field(default_factory=PairedTable)

    def __post_init__(self) -> None:
        self._known = {each.id for model in (self.pair.a, self.pair.b) for each in model.card.classes}

    def add(self, result: PairResult) -> None:
        """Count one image."""
        if result.error:
            self.num_errors += 1
            return
        self.num_images += 1
        self.num_disagreements += not result.agree
        # A label that neither model knows says nothing about which is better.
        if result.label in self._known:
            self.table += tabulate([(result.a[0].id == result.label, result.b[0].id == result.label)])

    def summary(self) -> ComparisonSummary:
        """Return what the counts say."""
        return ComparisonSummary(
            a=version_of(self.pair.a),
            b=version_of(self.pair.b),
            num_images=self.num_images,
            num_disagreements=self.num_disagreements,
            num_errors=self.num_errors,
            labelled=self.table if self.table.num_examples else None,
        )


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
        results, timings = await _predict(place, pair, batch, named, top_k)
    tally = Tally(pair)
    for result in results:
        tally.add(result)
    return Comparison(tuple(results), tally.summary(), timings)


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
    tally, timings, found = Tally(pair), Timings(), list[PairResult]()
    said_at, said = time.monotonic(), 0
    # Admitted once: a comparison that has begun is not refused half way.
    runtimes = pair.a.runtime, pair.b.runtime
    with scheduler.admit(MAX_BATCH, *runtimes, deadline=deadline, priority=priority, stream=True) as place:
        yield DatasetStep(ComparisonProgress(0, len(files)))
        for first in range(0, len(files), MAX_BATCH):
            chunk = files[first : first + MAX_BATCH]
            batch = await _decode(engine, pair, [path.read_bytes for path, _, _ in chunk])
            named = [(name, label) for _, name, label in chunk]
            results, took = await _predict(place, pair, batch, named, top_k)
            timings += took
            for result in results:
                tally.add(result)
            found += [result for result in results if result.error or not result.agree]
            num_done = first + len(chunk)
            if num_done - said >= PROGRESS_IMAGES or time.monotonic() - said_at >= PROGRESS_INTERVAL_S:
                yield DatasetStep(ComparisonProgress(num_done, len(files)), tuple(found))
                said_at, said, found = time.monotonic(), num_done, []
    yield DatasetStep(ComparisonProgress(len(files), len(files)), tuple(found), tally.summary(), timings)


async def _both(engine: Engine, model_a: str, model_b: str, priority: Priority) -> tuple[DeviceScheduler, Pair]:
    """Return both models on one device, and its scheduler."""
    a = await _classifier(engine, model_a, "model_a")
    # Or this call would hold the one, and wait for the room of the other.
    await engine.models.check_fits(a, model_b)
    b = await _classifier(engine, model_b, "model_b")
    pairs = [Pair(one.in_float32(), other.in_float32()) for one, other in zip(a.everywhere, b.everywhere, strict=True)]
    number = engine.devices.pick([(pair.a.runtime, pair.b.runtime) for pair in pairs], priority)
    return engine.devices[number], pairs[number]


async def _classifier(engine: Engine, reference: str, field: str) -> ServedClassifier:
    try:
        served = await engine.models.get(reference)
    except InvalidReference as error:
        raise InvalidReference(str(error), field=field) from None
    return as_classifier(served, field)


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
    place: Place, pair: Pair, batch: Batch, named: Sequence[tuple[str, str]], top_k: int
) -> tuple[list[PairResult], Timings]:
    """Return a result for each `(name, label)`, errors included."""
    results = [PairResult(name, label, error=error) for (name, label), error in zip(named, batch.errors, strict=True)]
    timings = Timings(decode_ms=batch.decode_ms)
    if not batch.indices:
        return results, timings
    answers = []
    for model, pixels in ((pair.a, batch.pixels[0]), (pair.b, batch.pixels[1])):
        # In batches of its own, so that both models see the same ones, whatever else is asked of them.
        done = await place.predict(model.runtime, pixels)
        timings += Timings(queue_ms=done.queue_ms, compute_ms=done.compute_ms)
        best = partial(best_classes, done.value, model.card.classes, top_k)
        answers.append(await off_the_loop(len(named) * top_k, best))
    for index, a, b in zip(batch.indices, *answers, strict=True):
        name, label = named[index]
        results[index] = PairResult(name, label, a, b, agree=_agree(a, b))
    return results, timings


def _agree(a: tuple[ScoredClass, ...], b: tuple[ScoredClass, ...]) -> bool:
    return a[0].id == b[0].id
