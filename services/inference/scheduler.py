"""One queue and one thread for each device: all work on a device passes through here, in turn.

Work is admitted by items (images), so that the queue is bounded whatever the size of the requests; it is cut into
pieces by the callers, so that a large request or a long text never holds the device for long. A piece whose caller has
gone or whose deadline has passed is dropped when its turn comes. Batching across requests fits in behind `predict`,
which is given a runtime and pixels rather than a closure.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tandem.errors import DeadlineExceeded, QueueFull, Unavailable

# Large enough for the best throughput that eager torch has on a CPU, small enough to let others in.
MAX_BATCH = 32
# Room for a few of the largest messages (1024 images); at 500 images/s some eight seconds of work.
MAX_ITEMS = 4096
RETRY_AFTER_S = 1.0

T = TypeVar("T")


class Predicts(Protocol):
    """What `predict` needs of a runtime."""

    def predict(self, pixels: Tensor) -> Tensor:
        """Return logits (B, C) for pixels (B, 3, S, S)."""
        ...


@dataclass(frozen=True)
class Done(Generic[T]):
    """The result of a piece of work, and the milliseconds that it waited and ran."""

    value: T
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class _Piece:
    work: Callable[[], Any]
    future: "asyncio.Future[Done[Any]]"
    loop: asyncio.AbstractEventLoop
    deadline: float | None
    queued_at: float


class DeviceScheduler:
    """Runs work on `device` one piece at a time; `admit` bounds what waits."""

    def __init__(self, device: torch.device, max_items: int = MAX_ITEMS) -> None:
        self.device = device
        self.max_items = max_items
        self.num_items = 0
        self._pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=f"device-{device}", daemon=True)
        self._thread.start()

    @contextmanager
    def admit(self, num_items: int) -> Iterator[None]:
        """Hold room for `num_items` items of a request; raise QueueFull if there is none.

        A request on its own is always let in: its own size has its own limits.
        """
        if self.num_items and self.num_items + num_items > self.max_items:
            raise QueueFull(
                f"the queue is full ({self.num_items} of {self.max_items} items); try again in {RETRY_AFTER_S:g} s",
                RETRY_AFTER_S,
            )
        self.num_items += num_items
        try:
            yield
        finally:
            self.num_items -= num_items

    async def run(self, work: Callable[[], T], deadline: float | None = None) -> Done[T]:
        """Run `work` on the device's thread in its turn; `deadline` is a time.monotonic() value.

        Raises DeadlineExceeded if the turn comes too late, Unavailable if the scheduler is closed before, and what
        `work` raises. Cancelled, it gives up its turn; work that has begun ends by itself.
        """
        if self._closed:
            raise _stopping()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Done[T]] = loop.create_future()
        self._pieces.put(_Piece(work, future, loop, deadline, time.monotonic()))
        return await future

    async def predict(self, runtime: Predicts, pixels: Tensor, deadline: float | None = None) -> Done[Tensor]:
        """Return logits (N, C) for pixels (N, 3, S, S) of any N ≥ 1, at most MAX_BATCH at a time."""
        done = [
            await self.run(lambda batch=batch: runtime.predict(batch), deadline)  # type: ignore[misc]
            for batch in torch.split(pixels, MAX_BATCH)
        ]
        return Done(
            torch.cat([each.value for each in done]),
            sum(each.queue_ms for each in done),
            sum(each.compute_ms for each in done),
        )

    def close(self) -> None:
        """Finish the piece that runs, fail the others with Unavailable, and end the thread."""
        self._closed = True
        self._pieces.put(None)
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        # Each thread has its own setting. Two at the least: with one, torch chooses other kernels for small batches
        # than for large ones, and the same image would get other roundings (see runtimes.eager).
        torch.set_num_threads(max(2, torch.get_num_threads()))
        while (piece := self._pieces.get()) is not None:
            if self._closed:
                _resolve(piece, error=_stopping())
            else:
                _run_piece(piece)


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping; try again")


def _run_piece(piece: _Piece) -> None:
    if piece.future.done():
        return
    started_at = time.monotonic()
    try:
        if piece.deadline is not None and started_at >= piece.deadline:
            raise DeadlineExceeded("the deadline passed while the request waited for the device")
        value = piece.work()
    except Exception as error:  # noqa: BLE001 - it belongs to the caller, who gets it
        _resolve(piece, error=error)
    else:
        waited, ran = started_at - piece.queued_at, time.monotonic() - started_at
        _resolve(piece, Done(value, waited * 1000, ran * 1000))


def _resolve(piece: _Piece, result: Done[Any] | None = None, error: Exception | None = None) -> None:
    def settle() -> None:
        # The caller may have been cancelled in the meantime.
        if piece.future.done():
            return
        if error is not None:
            piece.future.set_exception(error)
        elif result is not None:
            piece.future.set_result(result)

    # A loop that was closed has nobody left who waits.
    with suppress(RuntimeError):
        piece.loop.call_soon_threadsafe(settle)
