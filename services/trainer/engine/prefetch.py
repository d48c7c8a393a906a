"""Make the next batch while the current one trains."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Batch = TypeVar("Batch")


def prefetched(keys: Iterable[Key], make: Callable[[Key], Batch]) -> Iterator[Batch]:
    """Yield `make(key)` for each key in order, one batch ahead in a thread of its own."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: Future[Batch] | None = None
        for key in keys:
            following = pool.submit(make, key)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
