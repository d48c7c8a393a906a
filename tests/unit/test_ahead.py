"""Steps that overlap: one ahead, no further, and nothing left behind."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from waiting import until

from services.inference.ahead import one_ahead


class Source:
    """Yields 0, 1, …; remembers what it has begun, and whether it was closed."""

    def __init__(self, count: int, fails_at: int = -1, hangs_at: int = -1) -> None:
        self.begun: list[int] = []
        self.is_closed = False
        self._count, self._fails_at, self._hangs_at = count, fails_at, hangs_at

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self._count):
                self.begun.append(number)
                if number == self._fails_at:
                    raise ValueError(str(number))
                if number == self._hangs_at:
                    await asyncio.Event().wait()
                yield number
        finally:
            self.is_closed = True


async def test_the_next_is_made_while_one_is_worked_on() -> None:
    source, seen = Source(4), []
    async with aclosing(one_ahead(source.items())) as items:
        async for item in items:
            ahead = min(item + 2, 4)
            await until(lambda ahead=ahead: len(source.begun) == ahead)  # type: ignore[misc]
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(source.begun) == ahead, "no further than one"
            seen.append(item)
    assert seen == [0, 1, 2, 3]
    assert source.is_closed


async def test_an_error_comes_after_what_was_made_before_it() -> None:
    source = Source(4, fails_at=2)
    items = one_ahead(source.items())
    assert [await anext(items), await anext(items)] == [0, 1]
    with pytest.raises(ValueError, match="2"):
        await anext(items)
    assert source.is_closed


async def test_who_leaves_ends_what_is_being_made() -> None:
    source, before = Source(4, hangs_at=1), asyncio.all_tasks()
    async with aclosing(one_ahead(one_ahead(source.items()))) as items:
        async for item in items:
            assert item == 0
            await until(lambda: source.begun == [0, 1])
            break
    assert source.is_closed
    assert asyncio.all_tasks() == before


async def test_a_caller_that_is_cancelled_ends_it_too() -> None:
    source = Source(4, hangs_at=0)

    async def work() -> None:
        async with aclosing(one_ahead(source.items())) as items:
            async for _ in items:
                pass

    task = asyncio.create_task(work())
    await until(lambda: source.begun == [0])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.is_closed
