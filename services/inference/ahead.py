"""Steps of a long piece of work that overlap."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


async def one_ahead(source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yield what `source` yields; it makes the next one while the caller works on this one, and no more than that.

    Close it (`aclosing`): so is `source`, and what it was making is given up.
    """
    async with aclosing(source):
        coming = asyncio.create_task(_next(source))
        try:
            while (item := await coming) is not _END:
                coming = asyncio.create_task(_next(source))
                yield item
        finally:
            coming.cancel()
            # Its own end is nobody's any more: the caller has left, or was told of an error before.
            await asyncio.gather(coming, return_exceptions=True)


async def _next(source: AsyncGenerator[T, None]) -> T:
    return await anext(source, _END)
