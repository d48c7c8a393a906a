"""Announcements on Redis ask for a look at once; with Redis gone the server waits for it to come back."""

import asyncio
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from waiting import PATIENCE_S, wait_for

from services.inference.watch import listen
from tandem.jobs.broker import Broker
from tandem.jobs.store import MODELS_STREAM
from tandem.local.broker import broker_url, server_command, socket_path


async def until(condition: asyncio.Event) -> None:
    await asyncio.wait_for(condition.wait(), PATIENCE_S)
    condition.clear()


@pytest.fixture
def embedded_url() -> Iterator[str]:
    """The broker as `tandem up` embeds it, with its URL as Celery writes it."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory:
        socket = socket_path(Path(directory))
        with subprocess.Popen(server_command(socket, Path(directory)), stdout=subprocess.DEVNULL) as broker:
            try:
                wait_for(socket.exists)
                yield broker_url(socket)
            finally:
                broker.kill()


@pytest.mark.parametrize("kind", ["valkey_url", "embedded_url"])
async def test_each_announcement_wakes_the_watch(kind: str, request: pytest.FixtureRequest) -> None:
    url: str = request.getfixturevalue(kind)
    wake = asyncio.Event()
    task = asyncio.create_task(listen(lambda: Broker.of(url), wake))
    async with Redis(**Broker.of(url).client_options()) as redis:
        for _ in range(3):
            # The listener may not have begun: announcements from before it did don't count.
            for _ in range(50):
                await redis.xadd(MODELS_STREAM, {"name": "m", "version": "1"})
                if wake.is_set():
                    break
                await asyncio.sleep(0.05)
            await until(wake)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_redis_comes_late_and_is_spoken_of_once(valkey_url: str, caplog: pytest.LogCaptureFixture) -> None:
    wake, url = asyncio.Event(), "redis://127.0.0.1:1/0"
    with caplog.at_level(logging.INFO, logger="tandem.inference.watch"):
        task = asyncio.create_task(listen(lambda: Broker.of(url), wake))
        await asyncio.sleep(1.2)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        url = valkey_url
        for _ in range(100):
            if len(caplog.records) > 1:
                break
            await asyncio.sleep(0.05)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    task.cancel()


async def test_without_a_broker_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    task = asyncio.create_task(listen(lambda: None, asyncio.Event()))
    await asyncio.sleep(0.1)
    assert caplog.records == []
    task.cancel()
