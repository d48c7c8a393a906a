"""Answers to a stream of requests, in their order, worked on several at a time."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from services.inference.in_flight import working_on
from tandem.errors import Unavailable
from tandem.wire.limits import MAX_STREAM_REQUESTS

Request = TypeVar("Request")
Answer = TypeVar("Answer")

# Answers to one request that are kept until their turn; after these it waits.
_MAX_AHEAD = 4


@dataclass(frozen=True)
class Window:
    """How much of a stream is in work at once: so many requests, of so much weight; one is, whatever it weighs."""

    max_requests: int = MAX_STREAM_REQUESTS
    max_weight: int = 1


class _Room:
    """What of a window is taken."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._num_requests = self._weight = 0
        self._changed = asyncio.Event()

    def take(self, weight: int) -> None:
        self._num_requests += 1
        self._weight += weight

    def give(self, weight: int) -> None:
        self._num_requests -= 1
        self._weight -= weight
        self._changed.set()

    async def opens(self) -> None:
        """Wait until one more may come."""
        while self._num_requests >= self._window.max_requests or self._weight >= self._window.max_weight:
            self._changed.clear()
            await self._changed.wait()


class _End:
    """Comes last in a queue; `error` is why, if it is not all that there was."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


async def in_order(
    requests: AsyncIterator[Request],
    answers_to: Callable[[Request], AsyncGenerator[Answer, None]],
    window: Window = Window(),
    weigh: Callable[[Request], int] = lambda _: 0,
) -> AsyncGenerator[Answer, None]:
    """Yield all that `answers_to` yields for each of `requests`, in their order.

    No further request is read while those whose answers are not all told fill the `window`, so that the flow control of
    the transport holds their sender up. Raises what `requests` raises once those before are answered, and what
    `answers_to` does in its turn. Closed, it gives up what is under way.
    """
    turns: asyncio.Queue[tuple[int, asyncio.Queue[Answer | _End]] | _End] = asyncio.Queue()
    room = _Room(window)
    tasks: set[asyncio.Task[None]] = set()

    async def answer(request: Request, told: "asyncio.Queue[Answer | _End]") -> None:
        error: Exception | None = None
        try:
            with working_on(request):
                async with aclosing(answers_to(request)) as answers:
                    async for each in answers:
                        await told.put(each)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            # Something that it waited for was; nobody would tell its reader.
            error = Unavailable("what this waited for was given up; try again")
        except Exception as failure:  # noqa: BLE001 - it is raised where the answers are read
            error = failure
        await told.put(_End(error))

    def start(task: "asyncio.Task[None]") -> None:
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def read() -> None:
        error = None
        try:
            async for request in requests:
                told: asyncio.Queue[Answer | _End] = asyncio.Queue(_MAX_AHEAD)
                weight = weigh(request)
                room.take(weight)
                turns.put_nowait((weight, told))
                start(asyncio.create_task(answer(request, told)))
                # Not kept here while the next is waited for.
                del request
                await room.opens()
        except Exception as failure:  # noqa: BLE001 - it is raised where the answers are read
            error = failure
        turns.put_nowait(_End(error))

    start(asyncio.create_task(read()))
    try:
        while not isinstance(turn := await turns.get(), _End):
            weight, told = turn
            while not isinstance(each := await told.get(), _End):
                yield each
            _raise(each)
            room.give(weight)
        _raise(turn)
    finally:
        left = list(tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _raise(end: _End) -> None:
    if end.error is not None:
        raise end.error
