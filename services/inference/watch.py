"""Sees what is published: a look at the volume each second, and Redis as the shortcut that asks for a look at once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.inference.devices import Devices
from services.inference.registry import FAILURE_MEMORY_S, ServingRegistry
from tandem.errors import VolumeUnavailable
from tandem.jobs.broker import Broker
from tandem.jobs.broker_errors import broker_unavailable
from tandem.jobs.store import MODELS_STREAM, client_options

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


async def watch_volume(registry: ServingRegistry, models: Path, refreshed: OnRefreshed) -> None:
    """Refresh `registry` when the volume has changed, or it wants to, and tell `refreshed`; runs until cancelled."""
    async with asyncio.TaskGroup() as ends:
        await _watch_volume(registry, models, refreshed, ends)


async def _watch_volume(
    registry: ServingRegistry, models: Path, refreshed: OnRefreshed, ends: asyncio.TaskGroup
) -> None:
    before: Signature | None = None
    retry_at = 0.0
    wake = registry.wake

    async def tell_end(end: Awaitable[dict[str, bool]]) -> None:
        await refreshed(await end)

    while True:
        is_asked = wake.is_set()
        wake.clear()
        signature = await asyncio.to_thread(scan, models)
        now = asyncio.get_running_loop().time()
        if signature is None and before is not None:
            # Nothing is known to be gone: what is loaded goes on being served.
            log.warning("%s is not there; what is loaded goes on being served", models)
            before = None
        elif signature is not None and (
            is_asked
            or signature != before
            or (registry.has_failures and (now >= retry_at or await registry.find_mended()))
        ):
            try:
                # What is published meanwhile does not wait for the loads of this one.
                ends.create_task(tell_end(await registry.begin_refresh()))
                before, retry_at = signature, now + FAILURE_MEMORY_S
            except VolumeUnavailable:
                # Said already; it is looked at again.
                before = None
        # Not wait_for: Python 3.11's loses a cancel that comes with the wake-up, and the server would never stop.
        with suppress(TimeoutError):
            async with asyncio.timeout(SCAN_INTERVAL_S):
                await wake.wait()


async def watch_devices(devices: Devices, failed: Callable[[], Awaitable[None]]) -> None:
    """Tell `failed` once no device works any more; runs until it is cancelled."""
    while any(scheduler.is_alive for scheduler in devices):
        await asyncio.sleep(SCAN_INTERVAL_S)
    log.critical("no device works any more: this server answers nothing, and is to be started anew")
    await failed()
    await asyncio.Event().wait()


async def listen(find_broker: Callable[[], Broker | None], wake: asyncio.Event) -> None:
    """Set `wake` at each announcement on Redis; with Redis gone it waits and tries again. Runs until cancelled."""
    backoff_s, connected = 0.5, None
    while True:
        broker = await asyncio.to_thread(find_broker)
        if broker is not None:
            try:
                async with _connect(broker) as redis:
                    await redis.ping()
                    if connected is not True:
                        log.info("announcements are read from Redis")
                    connected, backoff_s = True, 0.5
                    await _read(redis, wake)
            except (RedisError, OSError) as error:
                if connected is not False:
                    said = broker_unavailable(error, str(broker))
                    log.warning("%s; until then the volume is looked at each second", said)
                connected = False
        await asyncio.sleep(backoff_s)
        backoff_s = min(backoff_s * 2, _MAX_BACKOFF_S)


def _connect(broker: Broker) -> Redis:
    # RESP2: in the newer protocol redis-py gives streams another shape.
    # No retries: `listen` tries again, and says so.
    return Redis(**client_options(broker), protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=_BLOCK_S * 2)


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
