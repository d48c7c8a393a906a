"""Sees what is published: a look at the volume each second, and Redis as the shortcut that asks for a look at once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.inference.registry import FAILURE_MEMORY_S, ServingRegistry
from tandem.jobs.store import MODELS_STREAM, client_url

SCAN_INTERVAL_S = 1.0
# After a failure that was not foreseen.
RESTART_S = 1.0
_BLOCK_S = 5.0
_MAX_BACKOFF_S = 10.0

log = logging.getLogger("tandem.inference.watch")

Signature = frozenset[tuple[str, int, int, int, int]]
OnRefreshed = Callable[[dict[str, bool]], Awaitable[None]]


def scan(models: Path) -> Signature | None:
    """Return what changes when a version or an alias does, from a few stats; None where the volume is gone."""
    try:
        return frozenset(_look(entry) for entry in models.iterdir() if not entry.name.startswith("."))
    except OSError:
        return None


def _look(model: Path) -> tuple[str, int, int, int, int]:
    versions = aliases = None
    num_versions = 0
    try:
        versions = (model / "versions").stat()
        num_versions = sum(1 for _ in (model / "versions").iterdir())
        # It is replaced whole, so that its inode changes even within a tick of the clock.
        aliases = (model / "aliases.json").stat()
    except OSError:
        pass
    return (
        model.name,
        versions.st_mtime_ns if versions else 0,
        num_versions,
        aliases.st_mtime_ns if aliases else 0,
        aliases.st_ino if aliases else 0,
    )


async def watch_volume(registry: ServingRegistry, models: Path, wake: asyncio.Event, refreshed: OnRefreshed) -> None:
    """Refresh `registry` when the volume has changed, and tell `refreshed`; runs until it is cancelled."""
    before: Signature | None = None
    retry_at = 0.0
    while True:
        wake.clear()
        signature = await asyncio.to_thread(scan, models)
        now = asyncio.get_running_loop().time()
        # Without the volume nothing is known to be gone: what is loaded goes on being served.
        if signature is not None and (signature != before or (registry.has_failures and now >= retry_at)):
            await refreshed(await registry.refresh())
            before, retry_at = signature, now + FAILURE_MEMORY_S
        try:
            await asyncio.wait_for(wake.wait(), SCAN_INTERVAL_S)
        except TimeoutError:
            continue


async def listen(find_url: Callable[[], str | None], wake: asyncio.Event) -> None:
    """Set `wake` at each announcement on Redis; with Redis gone it waits and tries again. Runs until cancelled."""
    backoff_s, connected = 0.5, None
    while True:
        url = await asyncio.to_thread(find_url)
        if url is not None:
            try:
                async with _connect(url) as redis:
                    await redis.ping()
                    if connected is not True:
                        log.info("announcements are read from Redis")
                    connected, backoff_s = True, 0.5
                    await _read(redis, wake)
            except (RedisError, OSError, ValueError) as error:
                if connected is not False:
                    log.warning("Redis does not answer (%s); the volume is looked at each second", _line(error))
                connected = False
        await asyncio.sleep(backoff_s)
        backoff_s = min(backoff_s * 2, _MAX_BACKOFF_S)


def _connect(url: str) -> Redis:
    # RESP2: in the newer protocol redis-py gives streams another shape.
    return Redis.from_url(client_url(url), protocol=2, socket_connect_timeout=2, socket_timeout=_BLOCK_S * 2)


async def _read(redis: Redis, wake: asyncio.Event) -> None:
    last: Any = "$"
    while True:
        answer: Any = await redis.xread({MODELS_STREAM: last}, count=100, block=int(_BLOCK_S * 1000))
        for _, entries in answer:
            last = entries[-1][0]
            wake.set()


async def keep_running(name: str, start: Callable[[], Awaitable[None]]) -> None:
    """Run `start()`, and again whenever it fails; each new failure is logged once. Runs until cancelled."""
    said = ""
    while True:
        try:
            await start()
        except Exception as error:
            line = f"{type(error).__name__}: {_line(error)}"
            if line != said:
                log.exception("%s failed; it is started again each %g s", name, RESTART_S)
            said = line
        await asyncio.sleep(RESTART_S)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
