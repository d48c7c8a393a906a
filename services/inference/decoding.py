"""Image bytes to pixels in threads: an image that can't be decoded fails alone, before anything is queued."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from services.inference.decode_threads import DecodeThreads
from services.inference.scheduler import Priority
from tandem.checkpoints.card import Preprocessing
from tandem.data.images import resize_and_crop, to_pixels
from tandem.data.raw_image import RawImage
from tandem.errors import InvalidImage, LimitExceeded
from tandem.wire.limits import MAX_MESSAGE_PIXELS

# A hop to a thread costs about as much as decoding a small JPEG (70 µs), so images travel in groups.
_GROUP = 8
# A single image of no more than that is decoded on the event loop, in 0.1 ms: the way to a thread and back is longer.
# Calls one after another took 0.9 of their time without it (n = 6 turns on busy cores, 0.68 to 0.95).
_QUICK_BYTES, _QUICK_PIXELS, _QUICK_SIDE = 16_384, 65_536, 128

log = logging.getLogger("tandem.inference.decoding")

Source = Callable[[], bytes | RawImage]
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """One image as each preprocessing wants it, uint8 (3, S, S) each; or the `error` for which there is none."""

    pixels: tuple[Tensor, ...]
    error: str = ""


@dataclass(frozen=True)
class Batch:
    """The images that could be decoded, for each preprocessing uint8 (N, 3, S, S), and where they came from.

    `indices` are the places of the N images among all; `errors` says for each place why it has none, else "".
    """

    pixels: tuple[Tensor, ...]
    indices: tuple[int, ...]
    errors: tuple[str, ...]
    decode_ms: float


class PixelBudget:
    """How many pixels the images of one call may have in all; shared by the threads that decode them."""

    def __init__(self, num_pixels: int = MAX_MESSAGE_PIXELS) -> None:
        self._num_pixels = self._left = num_pixels
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise LimitExceeded if nothing is left."""
        if self._left < 0:
            raise LimitExceeded(
                f"the images of the message have more than {self._num_pixels:,} pixels in all: send fewer at a time"
            )

    def take(self, num_pixels: int) -> None:
        """Take what an image had; what is too much ends the images that follow."""
        with self._lock:
            self._left -= num_pixels


class Decoder:
    """Threads that decode; torchvision and PIL let go of the interpreter's lock while they do."""

    def __init__(self, num_threads: int | None = None) -> None:
        self._threads = DecodeThreads(num_threads or len(os.sched_getaffinity(0)))

    async def decode(
        self,
        sources: Sequence[Source],
        preprocessings: Sequence[Preprocessing],
        budget: PixelBudget | None = None,
        priority: Priority = Priority.NORMAL,
        at_hand: bool = False,
    ) -> Batch:
        """Decode each image once, and transform it for each preprocessing from the same pixels.

        `at_hand`: the sources need not be read from anywhere, so that a small image may be decoded where this runs.
        Raises LimitExceeded if the images have more pixels together than `budget`.
        """
        started_at = time.monotonic()
        wanted = tuple(preprocessings)
        if at_hand and len(sources) == 1 and (at_once := _at_once(sources[0](), wanted, started_at)) is not None:
            return at_once

        def prepare(source: Source) -> Prepared:
            return _prepare(source, wanted, budget)

        def together(prepared: Sequence[Prepared]) -> Batch:
            if budget is not None:
                budget.check()
            return _together(prepared, len(wanted), started_at)

        # Tensors are made in the threads: on the loop each operation would let go of the interpreter's lock and wait
        # for it behind them, which took a single image 0.1 ms, and a copy of a thousand images holds all calls up.
        if len(sources) == 1:
            (batch,) = await self._threads.do(lambda source: together([prepare(source)]), sources, 1, priority)
        else:
            prepared = await self._threads.do(prepare, sources, _GROUP, priority)
            (batch,) = await self._threads.do(together, [prepared], 1, priority)
        return batch

    async def each(self, work: Callable[[S], T], items: Sequence[S], priority: Priority = Priority.NORMAL) -> list[T]:
        """Return `work` of each item, done in the threads."""
        return await self._threads.do(work, items, 1, priority)

    def close(self) -> None:
        """End the threads; what waits is dropped."""
        self._threads.close()


def _at_once(image: bytes | RawImage, preprocessings: tuple[Preprocessing, ...], started_at: float) -> Batch | None:
    """Return a small image decoded; None for what may take long, or can't be decoded, which is told elsewhere."""
    if len(image) > _QUICK_BYTES or any(each.image_size > _QUICK_SIDE for each in preprocessings):
        return None
    try:
        pixels = to_pixels(image, _QUICK_PIXELS)
        prepared = Prepared(tuple(resize_and_crop(pixels, each) for each in preprocessings))
    except Exception:  # noqa: BLE001 - whatever it is, it is met again where it is said
        return None
    return _together((prepared,), len(preprocessings), started_at)


def _together(prepared: Sequence[Prepared], num_preprocessings: int, started_at: float) -> Batch:
    indices = tuple(index for index, each in enumerate(prepared) if not each.error)
    pixels = tuple(
        torch.stack([prepared[index].pixels[number] for index in indices]) if indices else torch.empty(0)
        for number in range(num_preprocessings)
    )
    errors = tuple(each.error for each in prepared)
    return Batch(pixels, indices, errors, (time.monotonic() - started_at) * 1000)


def _prepare(source: Source, preprocessings: tuple[Preprocessing, ...], budget: PixelBudget | None) -> Prepared:
    try:
        if budget is not None:
            budget.check()
        pixels = to_pixels(source())
        if budget is not None:
            budget.take(pixels.shape[-2] * pixels.shape[-1])
        # Two models with the same transform share one result.
        made: dict[Preprocessing, Tensor] = {}
        for preprocessing in preprocessings:
            if preprocessing not in made:
                made[preprocessing] = resize_and_crop(pixels, preprocessing)
        return Prepared(tuple(made[preprocessing] for preprocessing in preprocessings))
    except LimitExceeded:
        raise
    except InvalidImage as error:
        return Prepared((), str(error))
    except OSError as error:
        return Prepared((), f"can't be read: {error.strerror or type(error).__name__}")
    except Exception:
        # Decoders have bugs; whatever one does on hostile bytes, it must not fail the image's neighbours.
        log.warning("an image made its decoder fail in an unknown way", exc_info=True)
        return Prepared((), "the image does not decode")
