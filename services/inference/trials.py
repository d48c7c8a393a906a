"""The way of what a load tries out to its device: from a thread into the queue, after all that callers wait for."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

from services.inference.scheduler import DeviceScheduler, Priority
from tandem.errors import Unavailable

# What is asked of a loop in its last moments is never answered; so often it is looked whether it is there.
_LOOK_S = 1.0
_STOPPING = "the server is stopping; the load was given up"

T = TypeVar("T")


def run_in_turn(scheduler: DeviceScheduler, loop: asyncio.AbstractEventLoop, work: Callable[[], T]) -> T:
    """Run `work` on the device of `scheduler` after all that is more urgent, and return what it returned.

    Beside what other workers run: alone it would have them all stop for it, some twenty times a load.

    For threads that are not the event loop's, which must go on. On a device that has failed it is run here. Raises what
    `work` does, and Unavailable where the server stops.
    """
    if not scheduler.is_alive:
        return work()
    if loop.is_closed():
        raise Unavailable(_STOPPING)
    asked = asyncio.run_coroutine_threadsafe(scheduler.run(work, priority=Priority.LOW, beside=True), loop)
    while True:
        try:
            return asked.result(_LOOK_S).value
        except TimeoutError:
            if asked.done():
                raise
            if loop.is_closed():
                raise Unavailable(_STOPPING) from None
        except concurrent.futures.CancelledError:
            raise Unavailable(_STOPPING) from None
