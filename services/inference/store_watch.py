"""Keeps a server's volume in step with an object store; the watch of the volume sees what has come."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from tandem.checkpoints.store.cache import StoreCache
from tandem.errors import VolumeUnavailable

# What is announced on Redis is looked for at once.
LOOK_INTERVAL_S = 10.0

log = logging.getLogger("tandem.inference.store")


async def watch_store(cache: StoreCache, look: asyncio.Event, looked: Callable[[bool], None]) -> None:
    """Refresh `cache` now, each 10 s and when `look` is set; tell `looked` whether something is new. Never returns.

    While the store is away, which is said once, what is on the volume is served; a server that has nothing to serve is
    told of no look, and waits.
    """
    is_away = False
    while True:
        look.clear()
        try:
            looked(await asyncio.to_thread(cache.refresh))
            if is_away:
                log.info("the object store answers again")
            is_away = False
        except VolumeUnavailable as error:
            if not is_away:
                log.warning("what is here goes on being served: %s", error)
            is_away = True
            if await asyncio.to_thread(cache.registry.names):
                looked(False)
        # Not wait_for: Python 3.11's loses a cancel that comes with the wake-up.
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_INTERVAL_S):
                await look.wait()
