"""Two replicas on one CPU: the same bits as with one, both at work, and a failed one that nobody waits for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from factories import CLASS_IDS, png, publish_classifier, publish_language_model
from waiting import held, until

from services.inference.devices import Devices, resolve_devices
from services.inference.scheduler import DeviceScheduler, Priority
from services.inference.server import Running, running_server
from tandem.client import AsyncClient, SamplingOptions, TextPiece
from tandem.errors import InvalidRequest, TandemError, Unavailable
from tandem.settings import Settings
from tandem.volume import Volume
from tandem.wire import limits
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc


@asynccontextmanager
async def serving(home: Path, device: str) -> AsyncIterator[Running]:
    settings = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(home), "TANDEM_DEVICE": device}
    async with running_server(Settings.from_environment(settings)) as running:
        for name in ("a", "b", "words"):
            await running.engine.models.get(name)
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Path:
    volume = Volume(tmp_path)
    publish_classifier(volume, "a", "run-a", seed=12)
    publish_classifier(volume, "b", "run-b", seed=13, classes=CLASS_IDS[::-1])
    publish_language_model(volume, "words", "run-l")
    return tmp_path


async def answers(client: AsyncClient) -> list[Any]:
    """Return what is said of many images, of two models and of texts, asked at once."""
    sampling = SamplingOptions(seed=3)

    async def text() -> str:
        pieces = client.generate("words", "the cat", 60, sampling)
        return "".join([piece.text async for piece in pieces if isinstance(piece, TextPiece)])

    classified = [client.classify("a", [png(number)]) for number in range(12)]
    compared = client.compare("a", "b", [png(number) for number in range(9)])
    texts = asyncio.gather(text(), text())
    results = [answer.results for answer in await asyncio.gather(*classified)]
    return [results, (await compared).results, await texts]


async def test_two_replicas_answer_as_one_does_and_both_are_used(home: Path) -> None:
    async with serving(home, "cpu") as running, AsyncClient(running.address) as client:
        alone = await answers(client)
        assert running.engine.devices.names() == ("cpu",)
    async with serving(home, "cpu,cpu") as running, AsyncClient(running.address) as client:
        devices, models = running.engine.devices, running.engine.models
        for _ in range(3):
            assert await answers(client) == alone
        details = await client.get_model("a")
        assert details.devices == ("cpu", "cpu")
        assert details.memory_bytes == (await models.get("a")).footprint.num_bytes > 0
        served = await models.get("a")
        counts = [scheduler.statistics(served.on(number).runtime) for number, scheduler in enumerate(devices)]
        assert all(each.num_batches for each in counts), "both were used"
        total = devices.statistics(served)
        assert total.num_items == sum(each.num_items for each in counts) >= 36
        assert total.success.ns == sum(each.success.ns for each in counts)
        assert sum(batches.count for batches in total.batches.values()) == total.num_batches
        # One that is busy is passed by.
        async with held(devices[0]):
            for number in range(5):
                await asyncio.wait_for(client.classify("a", [png(number)]), 120)
            assert devices.is_busy(served) is False
        text = await models.get("words")
        assert [each.runtime is text.runtime for each in text.everywhere] == [True, False]


async def test_the_limits_of_two_are_told_as_those_of_both(home: Path) -> None:
    async with serving(home, "cpu,cpu") as running, grpc.aio.insecure_channel(running.address) as channel:
        stub: Any = rpc.ModelsStub(channel)  # type: ignore[no-untyped-call]
        call = stub.ListModels(pb.ListModelsRequest())
        published = dict(await call.initial_metadata())
        await call
    assert published["tandem-limit-queue-items"] == str(2 * limits.MAX_QUEUE_ITEMS)
    assert published["tandem-limit-images-per-message"] == str(limits.MAX_IMAGES)


async def test_a_device_whose_thread_fails_leaves_its_calls_to_the_others(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(home, "cpu,cpu") as running, AsyncClient(running.address) as client:
        first, second = running.engine.devices

        def fail(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        async with held(second):
            monkeypatch.setattr(first, "_run", fail)
            waiting = [asyncio.create_task(client.classify("a", [png(number)])) for number in range(6)]
            await until(lambda: not first.is_alive)
        outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 120)
        # Whoever was on the first is told at once; nobody hangs.
        assert all(isinstance(each, Unavailable) or not isinstance(each, BaseException) for each in outcomes)
        assert any(isinstance(each, TandemError) for each in outcomes)
        for number in range(10):
            assert not (await client.classify("a", [png(number)])).results[0].error
        assert "the thread of cpu failed" in caplog.text
        publish_classifier(Volume(home), "c", "run-c", seed=1)
        assert not (await client.classify("c", [png(0)])).results[0].error


async def test_the_one_with_the_least_to_do_is_chosen() -> None:
    schedulers = [DeviceScheduler(device) for device in resolve_devices("cpu,cpu,cpu")]
    devices = Devices(schedulers)
    runtimes = [(object_,) for object_ in (_Runtime(), _Runtime(), _Runtime())]
    try:
        with schedulers[0].admit(5, *runtimes[0]), schedulers[1].admit(2, *runtimes[1]):
            assert devices.pick(runtimes, Priority.NORMAL) == 2
            with schedulers[2].admit(3, *runtimes[2]):
                assert devices.pick(runtimes, Priority.NORMAL) == 1
        schedulers[0].close()
        assert devices.pick(runtimes, Priority.NORMAL) == 1
    finally:
        devices.close()
    assert devices.pick(runtimes, Priority.NORMAL) == 0


class _Runtime:
    pass


def test_devices_of_several_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [str(device) for device in resolve_devices("cpu, cpu")] == ["cpu", "cpu"]
    for names in ("cpu,", "cpu,tpu"):
        with pytest.raises(InvalidRequest, match="is no device"):
            resolve_devices(names)
    with pytest.raises(InvalidRequest, match="of one kind"):
        resolve_devices("cpu,meta")
