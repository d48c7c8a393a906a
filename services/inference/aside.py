"""A thread beside the device's own: a network that nobody relies on runs in it, and the device waits for it a while.

The device's thread is every caller's. A shadow's candidate has its turns on it like other work, so that the two don't
contend for the cores; but it runs here, and where it takes too long, or hangs, the device goes on without it. A kernel
that hangs a GPU hangs what is queued behind it all the same; such a network hangs when it is loaded, too.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_Task = tuple[Callable[[], Any], "Future[Any]"]


class TookTooLong(Exception):
    """The work, or that of before, has not ended in time; it goes on, and its result is lost."""


class Closed(Exception):
    """Nothing is run any more."""


class Aside:
    """Runs one piece of work at a time. The thread begins with the first; `close` ends it after the last."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        # That nothing is put in after the end, and waited for.
        self._lock = threading.Lock()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._pending: Future[Any] | None = None

    def run(self, work: Callable[[], T], most_s: float) -> T:
        """Return `work()`, waiting for it no longer than `most_s` seconds.

        Raises what it does; TookTooLong if it has not ended by then, and at once while that of before goes on; Closed.
        """
        if self._pending is not None and not self._pending.done():
            raise TookTooLong
        future = self._pending = Future[T]()
        with self._lock:
            if self._closed:
                raise Closed
            self._begin()
            self._tasks.put((work, future))
        if wait([future], most_s).not_done:
            raise TookTooLong
        # Or the result, and what an error holds, would stay until the next.
        self._pending = None
        return future.result()

    def close(self) -> None:
        """End the thread once it is done with what it has, and run nothing any more."""
        with self._lock:
            self._closed = True
            self._tasks.put(None)

    def _begin(self) -> None:
        if self._thread is None:
            # Nobody waits at the end of the process for what hangs.
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        # As the device's thread has it, or the same image would get other roundings (see runtimes.eager).
        torch.set_num_threads(max(2, torch.get_num_threads()))
        while (task := self._tasks.get()) is not None:
            _do(*task)
            # While nothing else comes it would keep its model in memory.
            del task


def _do(work: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it belongs to who waits
        future.set_exception(error)
