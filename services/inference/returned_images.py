"""The images of a comparison that go back to its caller: those furthest apart, bounded in number and bytes."""

import heapq
from collections.abc import AsyncGenerator
from pathlib import Path

from services.inference.decoding import Decoder
from services.inference.scheduler import Priority
from tandem.comparison.results import PairResult
from tandem.data.encoded import small
from tandem.errors import InvalidImage, InvalidRequest
from tandem.wire.limits import MAX_RETURNED_BYTES, MAX_RETURNED_IMAGES

# A message of 2 MiB at the most: clients other than ours take 4.
_GROUP = 32


def check_num_returned(number: int) -> None:
    """Raise InvalidRequest where so many images are not sent."""
    if not 0 <= number <= MAX_RETURNED_IMAGES:
        raise InvalidRequest(
            f"num_returned_images is {number:,}; it must be 1 to {MAX_RETURNED_IMAGES}, or 0 for none",
            field="num_returned_images",
        )


class FurthestApart:
    """Of any number of pairs, the `limit` whose predictions are furthest apart; of equal ones, the first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._num_seen = limit, 0
        self._kept: list[tuple[float, int, str, Path]] = []

    def add(self, pair: PairResult, path: Path) -> None:
        """Take a pair, whose image is the file `path`, into account."""
        self._num_seen += 1
        heapq.heappush(self._kept, (pair.divergence, -self._num_seen, pair.name, path))
        if len(self._kept) > self._limit:
            heapq.heappop(self._kept)

    def ranked(self) -> list[tuple[str, Path]]:
        """Return name and file of those kept, those furthest apart first."""
        return [(name, path) for *_, name, path in sorted(self._kept, reverse=True)]


async def returned_images(
    decoder: Decoder, chosen: list[tuple[str, Path]], priority: Priority, max_bytes: int = MAX_RETURNED_BYTES
) -> AsyncGenerator[list[tuple[str, bytes]], None]:
    """Yield (name, encoded image) of the files `chosen`, some at a time, up to `max_bytes` in all.

    One that can't be read, or not any more, is left out.
    """
    for first in range(0, len(chosen), _GROUP):
        names, paths = zip(*chosen[first : first + _GROUP], strict=True)
        images = list[tuple[str, bytes]]()
        for name, data in zip(names, await decoder.each(_read, paths, priority), strict=True):
            if data is not None and (max_bytes := max_bytes - len(data)) >= 0:
                images.append((name, data))
        if images:
            yield images
        if max_bytes < 0:
            return


def _read(path: Path) -> bytes | None:
    try:
        return small(path.read_bytes())
    except (OSError, InvalidImage):
        return None
