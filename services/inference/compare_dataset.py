"""CompareDataset: a split of a dataset on the volume through two classifiers, batch by batch.

While the device computes a batch, the next one is decoded and the one before is weighed.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from services.inference.ahead import one_ahead
from services.inference.classify import check_top_k
from services.inference.compare import Computed, Pair, both_models, compute, decode, weigh
from services.inference.decoding import Batch
from services.inference.engine import Engine
from services.inference.returned_images import FurthestApart, check_num_returned, returned_images
from services.inference.scheduler import MAX_BATCH, Place, Priority
from services.inference.tally import Tally
from tandem.comparison.results import ComparisonSummary, PairResult, Timings
from tandem.data.manifest import ImageDataset, read_dataset, read_index, spread
from tandem.errors import DatasetNotFound, InvalidRequest
from tandem.names import check_name
from tandem.wire.results import ComparisonProgress

PROGRESS_IMAGES = 256
PROGRESS_INTERVAL_S = 1.0
DEFAULT_SPLIT = "val"


@dataclass(frozen=True)
class DatasetQuestion:
    """What is asked: two models, a split of a dataset (empty: val), `limit` (0: all) of its images, `top_k` classes
    each, and the files of `num_returned_images` of those that differ."""

    model_a: str
    model_b: str
    dataset: str
    split: str
    top_k: int
    limit: int
    num_returned_images: int = 0


@dataclass(frozen=True)
class DatasetStep:
    """What CompareDataset says from time to time: how far it is, and what it found since; in the end images, by their
    names, and the summary."""

    progress: ComparisonProgress
    found: tuple[PairResult, ...] = ()
    images: tuple[tuple[str, bytes], ...] = ()
    summary: ComparisonSummary | None = None
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True)
class Item:
    """An image of the split: its file, its path within the dataset, and the id of its class."""

    path: Path
    name: str
    label: str


class _Found:
    """What was found so far, and what of it is news to the caller."""

    def __init__(self, pair: Pair, question: DatasetQuestion, num_images: int) -> None:
        self.tally = Tally(pair.a, pair.b)
        self._pair = pair
        self.furthest = FurthestApart(question.num_returned_images)
        self.timings = Timings()
        self._top_k = check_top_k(question.top_k, PROGRESS_IMAGES)
        self._num_images, self._num_done = num_images, 0
        self._news: list[PairResult] = []
        self._told_at, self._num_told = time.monotonic(), 0

    def take(self, items: Sequence[Item], computed: Computed) -> None:
        """Take a batch into account; of 32 images of 200 classes a millisecond."""
        results = weigh(self._pair, self.tally, computed, [(item.name, item.label) for item in items], self._top_k)
        for item, result in zip(items, results, strict=True):
            if not result.error and not result.agree:
                self.furthest.add(result, item.path)
        self._news += [result for result in results if result.error or not result.agree]
        self._num_done += len(items)
        self.timings += computed.timings

    @property
    def is_due(self) -> bool:
        """Whether the caller has waited long enough for news."""
        is_late = time.monotonic() - self._told_at >= PROGRESS_INTERVAL_S
        return is_late or self._num_done - self._num_told >= PROGRESS_IMAGES

    def news(self, images: Sequence[tuple[str, bytes]] = ()) -> DatasetStep:
        """Return what the caller has not been told yet."""
        news, self._news = tuple(self._news), []
        self._told_at, self._num_told = time.monotonic(), self._num_done
        return DatasetStep(ComparisonProgress(self._num_done, self._num_images), news, tuple(images))


async def compare_dataset(
    engine: Engine, question: DatasetQuestion, deadline: float | None, priority: Priority = Priority.NORMAL
) -> AsyncGenerator[DatasetStep, None]:
    """Compare on a split of a dataset; yield progress about each second, then images, and the summary last."""
    check_top_k(question.top_k, PROGRESS_IMAGES)
    check_num_returned(question.num_returned_images)
    items = await asyncio.to_thread(_items, engine, question)
    scheduler, pair = await both_models(engine, question.model_a, question.model_b, priority)
    found = _Found(pair, question, len(items))
    # Admitted once: a comparison that has begun is not refused half way.
    runtimes = pair.a.runtime, pair.b.runtime
    with scheduler.admit(MAX_BATCH, *runtimes, deadline=deadline, priority=priority, stream=True) as place:
        yield found.news()
        async with aclosing(
            one_ahead(_computed(place, pair, one_ahead(_decoded(engine, pair, items, priority))))
        ) as batches:
            async for chunk, computed in batches:
                await asyncio.to_thread(found.take, chunk, computed)
                if found.is_due:
                    yield found.news()
        async with aclosing(returned_images(engine.decoder, found.furthest.ranked(), priority)) as groups:
            async for images in groups:
                yield found.news(images)
    summary = await asyncio.to_thread(found.tally.summary)
    yield replace(found.news(), summary=summary, timings=found.timings)


def _items(engine: Engine, question: DatasetQuestion) -> list[Item]:
    """Return `limit` (0: all) images of the split, spread evenly over its classes."""
    split = check_name(question.split or DEFAULT_SPLIT, "split")
    if question.limit < 0:
        raise InvalidRequest(f"limit is {question.limit}; it must be 1 or above, or 0 for all images", field="limit")
    manifest = read_dataset(engine.volume, question.dataset)
    if not isinstance(manifest, ImageDataset):
        raise InvalidRequest(
            f"dataset {question.dataset!r} holds text; comparing classifiers needs images", field="dataset"
        )
    directory = engine.volume.dataset(question.dataset)
    index = read_index(directory, split)
    rows = [index[place] for place in spread(len(index), question.limit or None)]
    if not rows:
        raise DatasetNotFound(f"split {split!r} of dataset {question.dataset!r} has no images")
    return [Item(directory / file, file, manifest.classes[label].id) for file, label in rows]


async def _decoded(
    engine: Engine, pair: Pair, items: Sequence[Item], priority: Priority
) -> AsyncGenerator[tuple[Sequence[Item], Batch], None]:
    for first in range(0, len(items), MAX_BATCH):
        chunk = items[first : first + MAX_BATCH]
        yield chunk, await decode(engine, pair, [item.path.read_bytes for item in chunk], priority)


async def _computed(
    place: Place, pair: Pair, decoded: AsyncGenerator[tuple[Sequence[Item], Batch], None]
) -> AsyncGenerator[tuple[Sequence[Item], Computed], None]:
    async with aclosing(decoded):
        async for chunk, batch in decoded:
            yield chunk, await compute(place, pair, batch)
