"""Classify: bytes → pixels → logits → the best classes of each image."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from services.inference.calls import Ranked, rank
from services.inference.decoding import PixelBudget
from services.inference.engine import Engine
from services.inference.loading import as_classifier, version_of
from services.inference.scheduler import Priority
from tandem.checkpoints.card import Preprocessing
from tandem.comparison.results import ScoredClass, Timings
from tandem.data.manifest import ClassName
from tandem.data.raw_image import RawImage
from tandem.errors import InvalidRequest
from tandem.wire.limits import DEFAULT_TOP_K, MAX_ANSWERS, MAX_IMAGES
from tandem.wire.results import Classification, ImageResult

# Scored classes that take no longer (about 2 ms) than others can wait.
_QUICK = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class GivenImage:
    """An image as it came, encoded or raw; `label` is the id of its true class, where it is known."""

    name: str
    data: bytes | RawImage
    label: str = ""


async def classify(
    engine: Engine,
    reference: str,
    images: Sequence[GivenImage],
    top_k: int,
    deadline: float | None,
    priority: Priority = Priority.NORMAL,
) -> Classification:
    """Return the `top_k` classes of each image; one that can't be decoded has an error instead."""
    top_k = check_top_k(top_k, len(images))
    check_images(images)
    served = as_classifier(await engine.models.get(reference))
    scheduler, model = engine.devices.choose(served, priority)
    admitted = scheduler.admit(
        len(images),
        model.runtime,
        num_bytes=num_bytes(images, model.card.preprocessing),
        deadline=deadline,
        priority=priority,
        joins=model.joins,
    )
    with admitted as place:
        sources = [lambda image=image: image.data for image in images]
        batch = await engine.decoder.decode(sources, [model.card.preprocessing], PixelBudget(), priority, at_hand=True)
        timings = Timings(decode_ms=batch.decode_ms)
        results = [ImageResult(image.name, error=error) for image, error in zip(images, batch.errors, strict=True)]
        if batch.indices:
            done = await place.rank(model.runtime, batch.pixels[0], top_k, model.joins)
            timings += Timings(queue_ms=done.queue_ms, compute_ms=done.compute_ms)
            classes = model.card.classes
            answers = await off_the_loop(len(images) * top_k, lambda: named(done.value, classes))
            for index, best in zip(batch.indices, answers, strict=True):
                results[index] = ImageResult(images[index].name, best)
    engine.shadows.offer(reference, served, images, batch)
    return Classification(version_of(model), tuple(results), timings)


async def off_the_loop(num_scored: int, work: Callable[[], T]) -> T:
    """Return `work()`; one that makes many scored classes runs in a thread, so that other calls don't wait for it."""
    return work() if num_scored <= _QUICK else await asyncio.to_thread(work)


def check_top_k(top_k: int, num_images: int) -> int:
    """Return `top_k`, or the default for 0; raise InvalidRequest if it is negative, or too much for `num_images`."""
    if top_k < 0:
        raise InvalidRequest(f"top_k is {top_k}; it must be 1 or above, or 0 for {DEFAULT_TOP_K}", field="top_k")
    if top_k * num_images > MAX_ANSWERS:
        raise InvalidRequest(
            f"top_k {top_k:,} for {num_images:,} images makes {top_k * num_images:,} answers; the limit is "
            f"{MAX_ANSWERS:,} in a message",
            field="top_k",
        )
    return top_k or DEFAULT_TOP_K


def check_images(images: Sequence[GivenImage]) -> None:
    """Raise InvalidRequest if there are no images, or too many for a message."""
    if not images:
        raise InvalidRequest("there are no images in the request", field="images")
    if len(images) > MAX_IMAGES:
        raise InvalidRequest(f"{len(images)} images in a message; the limit is {MAX_IMAGES}", field="images")


def num_bytes(images: Sequence[GivenImage], *preprocessings: Preprocessing) -> int:
    """Return what `images` take in memory while they are classified: as they came, and for each preprocessing."""
    pixels = sum(3 * preprocessing.image_size**2 for preprocessing in preprocessings)
    return sum(len(image.data) for image in images) + len(images) * pixels


def best_classes(logits: Tensor, classes: Sequence[ClassName], top_k: int) -> list[tuple[ScoredClass, ...]]:
    """Return the `top_k` classes (or all, if they are fewer) of each row of logits (N, C), best first."""
    return named(rank(logits, top_k), classes)


def named(ranked: Ranked, classes: Sequence[ClassName]) -> list[tuple[ScoredClass, ...]]:
    """Return the classes of each row of `ranked`."""
    return [
        tuple(
            ScoredClass(index, classes[index].id, classes[index].words, probability)
            for index, probability in zip(row_indices, row_probabilities, strict=True)
        )
        for row_indices, row_probabilities in zip(ranked.indices.tolist(), ranked.probabilities.tolist(), strict=True)
    ]
