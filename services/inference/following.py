"""Who follows the volume when: each reference on its own, so that no model waits for another's load.

What is loaded without a caller stands in a line. Its room is given out in the order of the line, so that the newest
models have it where not all fit; as many load at once as there are loaders.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from tandem.checkpoints.references import ModelReference


class Line:
    """`num_at_once` load at a time. Lives on one event loop."""

    def __init__(self, num_at_once: int) -> None:
        self._num_at_once = num_at_once
        # In their order.
        self._standing: dict[Place, None] = {}
        self._loading: set[Place] = set()
        self._moved = asyncio.Event()

    def stand(self) -> "Place":
        """Return a place at the end."""
        place = Place(self)
        self._standing[place] = None
        return place

    def has_come(self, place: "Place") -> bool:
        """Return whether `place` may ask for room now, or holds it."""
        return place in self._loading

    async def comes(self, place: "Place") -> None:
        """Wait until all before `place` have their room or need none, and a loader is free."""
        # Whoever has left, and loads something else, comes last.
        self._standing.setdefault(place)
        while next(iter(self._standing)) is not place or len(self._loading) >= self._num_at_once:
            self._moved.clear()
            await self._moved.wait()
        self._loading.add(place)

    def step_aside(self, place: "Place") -> None:
        """Let the next one come."""
        self._standing.pop(place, None)
        self._moved.set()

    def leave(self, place: "Place") -> None:
        """Let the next one come, and have the loader."""
        self._loading.discard(place)
        self.step_aside(place)


class Place:
    """Of one who follows a reference, in a line."""

    def __init__(self, line: Line) -> None:
        self._line = line

    @property
    def has_come(self) -> bool:
        """True if it may ask for room now."""
        return self._line.has_come(self)

    async def comes(self) -> None:
        """Wait until it may ask for room."""
        await self._line.comes(self)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Have room within the context, and let the next one ask for its own."""
        self._line.step_aside(self)
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Need nothing any more."""
        self._line.leave(self)


class Following:
    """`follow` run for each reference that is asked for, once at a time."""

    def __init__(self, follow: Callable[[ModelReference, Place], Awaitable[None]], num_loaders: int) -> None:
        self._follow, self._line = follow, Line(num_loaders)
        self._running: dict[ModelReference, asyncio.Task[None]] = {}
        self._waiting: dict[ModelReference, asyncio.Task[None]] = {}

    def ask(self, reference: ModelReference) -> "asyncio.Task[None]":
        """Follow `reference` to what the volume says from now on; return what does."""
        if (waiting := self._waiting.get(reference)) is not None:
            return waiting
        # What runs already may have looked at the volume before now: it is followed by one more.
        before = self._running.get(reference)
        place = self._line.stand() if before is None else None
        task = self._waiting[reference] = asyncio.create_task(self._run(reference, before, place))
        return task

    async def close(self) -> None:
        """Give up what runs."""
        tasks = [*self._running.values(), *self._waiting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, reference: ModelReference, before: "asyncio.Task[None] | None", place: Place | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        place = place or self._line.stand()
        task = self._running[reference] = self._waiting.pop(reference)
        try:
            await self._follow(reference, place)
        finally:
            place.leave()
            if self._running.get(reference) is task:
                del self._running[reference]
