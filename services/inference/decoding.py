"""Image bytes to pixels in threads: an image that can't be decoded fails alone, before anything is queued."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tandem.checkpoints.card import Preprocessing
from tandem.data.images import decode_image, resize_and_crop
from tandem.errors import InvalidImage

# A hop to a thread costs about as much as decoding a small JPEG (70 µs), so images travel in groups.
_GROUP = 8

log = logging.getLogger("tandem.inference.decoding")

Source = Callable[[], bytes]


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


class Decoder:
    """A pool of threads that decode; torchvision and PIL let go of the interpreter's lock while they do."""

    def __init__(self, num_threads: int | None = None) -> None:
        workers = num_threads or len(os.sched_getaffinity(0))
        # One thread of torch's own in each, or resizing would wake a team in every one of them.
        self._pool = ThreadPoolExecutor(workers, "decode", initializer=torch.set_num_threads, initargs=(1,))

    async def decode(self, sources: Sequence[Source], preprocessings: Sequence[Preprocessing]) -> Batch:
        """Decode each image once, and transform it for each preprocessing from the same pixels."""
        started_at = time.monotonic()
        loop = asyncio.get_running_loop()
        groups = [sources[first : first + _GROUP] for first in range(0, len(sources), _GROUP)]
        work = partial(_prepare_group, preprocessings=tuple(preprocessings))
        done = await asyncio.gather(*(loop.run_in_executor(self._pool, work, group) for group in groups))
        prepared = [each for group in done for each in group]
        indices = tuple(index for index, each in enumerate(prepared) if not each.error)
        pixels = tuple(
            torch.stack([prepared[index].pixels[number] for index in indices]) if indices else torch.empty(0)
            for number in range(len(preprocessings))
        )
        errors = tuple(each.error for each in prepared)
        return Batch(pixels, indices, errors, (time.monotonic() - started_at) * 1000)

    def close(self) -> None:
        """End the threads; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _prepare_group(sources: Sequence[Source], preprocessings: tuple[Preprocessing, ...]) -> list[Prepared]:
    return [_prepare(source, preprocessings) for source in sources]


def _prepare(source: Source, preprocessings: tuple[Preprocessing, ...]) -> Prepared:
    try:
        pixels = decode_image(source())
        # Two models with the same transform share one result.
        made: dict[Preprocessing, Tensor] = {}
        for preprocessing in preprocessings:
            if preprocessing not in made:
                made[preprocessing] = resize_and_crop(pixels, preprocessing)
        return Prepared(tuple(made[preprocessing] for preprocessing in preprocessings))
    except InvalidImage as error:
        return Prepared((), str(error))
    except OSError as error:
        return Prepared((), f"can't be read: {error.strerror or type(error).__name__}")
    except Exception:
        # Decoders have bugs; whatever one does on hostile bytes, it must not fail the image's neighbours.
        log.warning("an image made its decoder fail in an unknown way", exc_info=True)
        return Prepared((), "the image does not decode")
