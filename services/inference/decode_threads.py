"""Threads that do the work of calls, in turns: one is a group of items, and of long ones no more than take TURN_S."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from services.inference.decode_order import CallInOrder, DecodeOrder
from services.inference.lanes import Priority

# After so long a thread looks whether others go first, between two items: a large image takes as long as that alone.
TURN_S = 0.01

S = TypeVar("S")
T = TypeVar("T")


class Group:
    """Items of a call that a thread takes together; `future` gets the list of what `work` makes of them."""

    def __init__(self, work: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._work, self._items = work, items
        self._done: list[Any] = []
        self.future: Future[list[Any]] = Future()

    def go_on(self, turn_s: float) -> bool:
        """Do items until the turn is over; return whether all are done, or one has failed."""
        if not self._done and not self.future.set_running_or_notify_cancel():
            return True
        ends_at = time.monotonic() + turn_s
        try:
            while len(self._done) < len(self._items):
                self._done.append(self._work(self._items[len(self._done)]))
                if time.monotonic() >= ends_at:
                    break
        except BaseException as error:  # noqa: BLE001 - whoever waits for it is told
            self.future.set_exception(error)
            # Its traceback holds this frame: what the items take in memory would wait for the collector.
            del self
            return True
        if len(self._done) < len(self._items):
            return False
        self.future.set_result(self._done)
        return True


class DecodeThreads:
    """`num_threads` threads; which group one takes is decided when it is free."""

    def __init__(self, num_threads: int, turn_s: float = TURN_S) -> None:
        self._turn_s = turn_s
        # One thread of torch's own in each, or resizing would wake a team in every one of them.
        self._pool = ThreadPoolExecutor(num_threads, "decode", initializer=torch.set_num_threads, initargs=(1,))
        self._order = DecodeOrder[Group]()
        self._lock = threading.Lock()

    async def do(self, work: Callable[[S], T], items: Sequence[S], group_size: int, priority: Priority) -> list[T]:
        """Return `work` of each item, or raise what the first group raises that fails; what has not begun then, or when
        this is cancelled, is dropped."""
        groups = [Group(work, items[first : first + group_size]) for first in range(0, len(items), group_size)]
        call = CallInOrder(priority, groups)
        try:
            with self._lock:
                self._order.add(call, time.monotonic())
            # The pool's own queue only counts: as many of these wait as groups do.
            for _ in groups:
                self._pool.submit(self._finish_one)
            told = [asyncio.wrap_future(group.future) for group in groups]
            # One alone need not be gathered: most calls bring one.
            done = [await told[0]] if len(told) == 1 else await asyncio.gather(*told)
        finally:
            with self._lock:
                left = self._order.drop(call)
            for group in left:
                group.future.cancel()
        return [each for group in done for each in group]

    def close(self) -> None:
        """End the threads; what waits is dropped."""
        with self._lock:
            waiting = self._order.drain()
        for group in waiting:
            _give_up(group)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _finish_one(self) -> None:
        """Give turns to those whose they are, until a group is done; nothing waits where others took it, or it was
        dropped."""
        with self._lock:
            taken = self._order.take(time.monotonic())
        while taken is not None:
            call, group = taken
            if group.go_on(self._turn_s):
                return
            with self._lock:
                now = time.monotonic()
                waits = self._order.put_back(call, group, now)
                taken = self._order.take(now) if waits else None
            if not waits:
                _give_up(group)


def _give_up(group: Group) -> None:
    """End a group that nobody takes any more for whoever waits for it."""
    if not group.future.cancel() and not group.future.done():
        group.future.set_exception(asyncio.CancelledError())
