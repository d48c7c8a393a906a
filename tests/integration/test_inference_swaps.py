"""Models swapped, unloaded and lost under load: no call fails that could be answered, and memory comes back."""

import asyncio
import gc
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from factories import break_weights, png, publish_classifier, publish_language_model
from grpc_health.v1 import health_pb2, health_pb2_grpc
from waiting import PATIENCE_S, until, wait_for

from services.inference import watch
from services.inference.loading import ServedClassifier, load
from services.inference.memory import taken_on
from services.inference.server import Running, running_server
from tandem.checkpoints.registry import Located
from tandem.client import AsyncClient, GenerationSummary, SamplingOptions
from tandem.errors import ModelUnloaded, TandemError, VolumeUnavailable
from tandem.jobs.broker import Broker
from tandem.jobs.store import MODELS_STREAM
from tandem.local.broker import broker_url, server_command, socket_path
from tandem.settings import Settings
from tandem.volume import Volume

NUM_SWAPS = 6
# Of a classifier and a language model each.
NUM_RELOADS = 30


@asynccontextmanager
async def serving(volume: Volume, **changes: str) -> AsyncIterator[Running]:
    environment = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(volume.home), "TANDEM_DEVICE": "cpu", **changes}
    async with running_server(Settings.from_environment(environment)) as running:
        yield running


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    """With a classifier `pictures` and a language model `words`."""
    volume = Volume(tmp_path / "home")
    publish_classifier(volume, "pictures", "run-1", seed=1)
    publish_language_model(volume, "words", "run-l")
    return volume


@pytest.fixture
def quick_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SCAN_INTERVAL_S", 0.05)


@dataclass
class Callers:
    """Who classify again and again: the versions that answered each, in order, and what failed."""

    address: str
    versions: list[list[int]] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    @asynccontextmanager
    async def calling(self, num_callers: int = 3, model: str = "pictures") -> AsyncIterator[None]:
        async with AsyncClient(self.address) as client:
            tasks = [asyncio.create_task(self._call(client, model)) for _ in range(num_callers)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_calls(self) -> int:
        return sum(map(len, self.versions))

    async def _call(self, client: AsyncClient, model: str) -> None:
        seen: list[int] = []
        self.versions.append(seen)
        while True:
            try:
                seen.append((await client.classify(model, [png(len(seen) % 5)])).model.version)
            except TandemError as error:
                self.failures.append(error)
            await asyncio.sleep(0.01)

    async def go_on(self, num_calls: int = 20) -> None:
        """Wait until so many more calls were answered."""
        wanted = self.num_calls + num_calls
        await until(lambda: self.num_calls >= wanted)


async def test_swaps_under_load_fail_no_call(volume: Volume, quick_scans: None, tried: "Counter[str]") -> None:
    async with serving(volume) as running:
        callers, models = Callers(running.address), running.engine.models
        runtimes = [weakref.ref((await models.get("pictures")).runtime)]
        async with callers.calling(), AsyncClient(running.address) as client:
            text = asyncio.create_task(_words(client))
            for number in range(2, NUM_SWAPS + 2):
                publish_classifier(volume, "pictures", f"run-{number}", seed=number)
                await until(lambda number=number: models.loaded_versions("pictures") == (number,))  # type: ignore[misc]
                runtimes.append(weakref.ref((await models.get("pictures")).runtime))
                await callers.go_on(10)
                tried["model swapped under load"] += 1
            assert await text == 500
        assert callers.failures == []
        for seen in callers.versions:
            assert seen == sorted(seen), "no caller is answered by an older version than before"
            assert seen[-1] == NUM_SWAPS + 1
        gc.collect()
        assert [reference() is None for reference in runtimes] == [True] * NUM_SWAPS + [False]
        assert models.loaded_versions("pictures") == (NUM_SWAPS + 1,)


async def _words(client: AsyncClient) -> int:
    pieces = [piece async for piece in client.generate("words", None, 500, SamplingOptions(seed=1, allow_unknown=True))]
    assert isinstance(pieces[-1], GenerationSummary)
    return pieces[-1].num_words


async def test_unloading_while_busy_ends_no_call(volume: Volume, tried: "Counter[str]") -> None:
    async with serving(volume) as running, AsyncClient(running.address) as client:
        models = running.engine.models
        text = client.generate("words", None, 2000, SamplingOptions(seed=1))
        first = await anext(text)
        callers = Callers(running.address)
        async with callers.calling():
            await callers.go_on(5)
            for _ in range(5):
                await models.unload("pictures")
                await until(lambda: callers.failures)
                assert all(isinstance(error, ModelUnloaded) for error in callers.failures)
                callers.failures.clear()
                await models.load("pictures")
                await callers.go_on(5)
                tried["model unloaded under load"] += 1
            await models.unload("words")
        with pytest.raises(ModelUnloaded, match="was unloaded"):
            await anext(client.generate("words", None, 1))
        rest = [piece async for piece in text]
        assert first != rest[-1]
        assert isinstance(rest[-1], GenerationSummary)
        assert rest[-1].num_words == 2000, "a text under way goes on to its end"
        gc.collect()
        await until(lambda: models.budget.held == sum(served.footprint.num_bytes for served in models.loaded()))


async def test_loads_and_unloads_that_race_end_in_a_model_that_answers(volume: Volume, tried: "Counter[str]") -> None:
    async with serving(volume, TANDEM_ENGINE="eager") as running:
        models = running.engine.models

        async def try_it(number: int) -> object:
            await asyncio.sleep(number % 7 / 100)
            if number % 3 == 0:
                await models.unload("words")
                return "unloaded"
            return (await (models.load if number % 3 == 1 else models.get)("words")).located.label

        outcomes = await asyncio.gather(*(try_it(number) for number in range(90)), return_exceptions=True)
        tried["load, unload and call at once"] += len(outcomes)
        assert {type(outcome) for outcome in outcomes} <= {str, ModelUnloaded}
        assert (await models.load("words")).located.label == "words:1"
        assert (await models.get("words")).located.label == "words:1"
        outcomes.clear()
        gc.collect()
        assert models.budget.held == sum(served.footprint.num_bytes for served in models.loaded())


async def test_what_is_unloaded_is_freed(volume: Volume, tried: "Counter[str]") -> None:
    async with serving(volume, TANDEM_ENGINE="openvino") as running:
        models, sizes = running.engine.models, list[int]()
        gone: list[weakref.ref[Any]] = []
        for _ in range(NUM_RELOADS):
            for name in ("pictures", "words"):
                served = await models.load(name)
                gone += [weakref.ref(runtime) for runtime in served.runtimes]
                if isinstance(served, ServedClassifier):
                    assert served.runtime.name == "openvino"
                    await running.engine.scheduler.predict(served.runtime, _pixels())
                await models.unload(name)
                del served
                tried["model loaded and unloaded"] += 1
            sizes.append(taken_on(running.engine.scheduler.device))
        # A look at the volume that an unload has asked for may hold the last ones for a moment.
        async with asyncio.timeout(60):
            while any(reference() is not None for reference in gone) or models.budget.held:
                await asyncio.sleep(0.05)
                gc.collect()
    # It levels off: the second half of them adds no more than a fraction of what one of them takes.
    half = NUM_RELOADS // 2
    assert min(sizes[-10:]) - min(sizes[half - 10 : half]) < 8 * 2**20, [size >> 20 for size in sizes]


def _pixels() -> Any:
    import torch

    return torch.zeros(8, 3, 32, 32, dtype=torch.uint8)


async def test_the_volume_goes_and_comes_back(volume: Volume, quick_scans: None, tried: "Counter[str]") -> None:
    async with serving(volume) as running, AsyncClient(running.address) as client:
        await client.wait_until_serving("pictures", timeout_s=PATIENCE_S)
        callers = Callers(running.address)
        async with callers.calling():
            for path in (volume.models, volume.home, volume.models, volume.home):
                away = path.with_name(f"{path.name}.away")
                path.rename(away)
                await callers.go_on()
                with pytest.raises(VolumeUnavailable, match="the shared volume is not there"):
                    await client.classify("pictures:1", [png(0)])
                assert await _status(running, "models/pictures") == health_pb2.HealthCheckResponse.SERVING
                away.rename(path)
                tried[f"{'models' if path == volume.models else 'volume'} gone and back"] += 1
            # And replaced by a copy, as from a backup; what is published there is found.
            shutil.copytree(volume.models, volume.home / "copy")
            volume.models.rename(volume.home / "old")
            (volume.home / "copy").rename(volume.models)
            tried["models replaced"] += 1
            publish_classifier(volume, "pictures", "run-2", seed=2)
            await until(lambda: callers.versions[0][-1:] == [2])
        assert callers.failures == []
        await until(lambda: not running.engine.models.has_failures)


async def test_a_volume_that_goes_during_a_load_is_not_the_checkpoints_fault(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(volume, TANDEM_ENGINE="eager") as running:
        models = running.engine.models
        located = await asyncio.to_thread(models.registry.resolve, "words")
        monkeypatch.setattr(models.registry, "resolve", lambda _: located)
        away = volume.home.with_name("away")
        await models.unload("words")
        volume.home.rename(away)
        with pytest.raises(VolumeUnavailable):
            await models.load("words")
        away.rename(volume.home)
        assert (await models.get("words")).located.label == "words:1"


async def test_health_says_at_once_what_is_unloaded_while_another_loads(
    volume: Volume, quick_scans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, opened = threading.Event(), threading.Event()

    def hold(located: Located, *rest: Any) -> Any:
        if located.label == "slow:1":
            begun.set()
            opened.wait(PATIENCE_S)
        return load(located, *rest)

    monkeypatch.setattr("services.inference.server.load", hold)
    serving_it, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with serving(volume, TANDEM_ENGINE="eager") as running, AsyncClient(running.address) as client:
        await client.wait_until_serving("pictures", timeout_s=PATIENCE_S)
        await client.wait_until_serving("words", timeout_s=PATIENCE_S)
        publish_classifier(volume, "slow", "run-slow", seed=3)
        try:
            assert await asyncio.to_thread(begun.wait, PATIENCE_S)
            await running.engine.models.unload("words")
            assert await _status(running, "models/words") == not_serving
            publish_classifier(volume, "pictures", "run-2", seed=2)
            await until(lambda: running.engine.models.loaded_versions("pictures") == (2,))
            await running.engine.models.load("words")
            assert await _status(running, "models/words") == serving_it
        finally:
            opened.set()
        await client.wait_until_serving("slow", timeout_s=PATIENCE_S)
        assert await _status(running, "models/words") == serving_it


async def _status(running: Running, service: str) -> int:
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


@pytest.fixture
def broker() -> Iterator["Valkey"]:
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory:
        broker = Valkey(Path(directory))
        yield broker
        broker.kill()


class Valkey:
    """A broker that is not there until it is started, and can be killed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = socket_path(directory)
        self.url = broker_url(self._socket)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        command = server_command(self._socket, self._directory)
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(self._socket.exists)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(120)
            self._process = None


async def test_redis_may_be_gone_from_the_start_or_go_in_the_middle(
    volume: Volume, broker: Valkey, tried: "Counter[str]"
) -> None:
    async with serving(volume, TANDEM_REDIS_URL=broker.url, TANDEM_ENGINE="eager") as running:
        await until(lambda: running.engine.models.loaded_versions("pictures"))
        callers = Callers(running.address)
        async with callers.calling(1):
            for number, change in enumerate((lambda: None, broker.start, broker.kill, broker.start), 2):
                await asyncio.to_thread(change)
                publish_classifier(volume, "pictures", f"run-{number}", seed=number)
                if change == broker.start:
                    async with _client(broker) as redis:
                        await redis.xadd(MODELS_STREAM, {"name": "pictures", "version": str(number)})
                await until(lambda number=number: callers.versions[0][-1:] == [number])  # type: ignore[misc]
                tried["Redis gone or back while a version is published"] += 1
        assert callers.failures == []


def _client(broker: Valkey) -> Any:
    from redis.asyncio import Redis

    return Redis(**Broker.of(broker.url).client_options())


async def test_a_broken_version_is_refused_under_load(volume: Volume, quick_scans: None, tried: "Counter[str]") -> None:
    async with serving(volume, TANDEM_ENGINE="eager") as running:
        callers = Callers(running.address)
        async with callers.calling():
            await callers.go_on(5)
            # Broken before it is published, so that the server never sees it whole.
            break_weights(volume, publish_classifier(volume, "staged", "run-2", seed=2))
            record = (volume.model("staged") / "versions" / "0001.json").read_text()
            document = record.replace('"staged"', '"pictures"').replace('"version": 1', '"version": 2')
            (volume.model("pictures") / "versions" / "0002.json").write_text(document)
            (volume.model("pictures") / "aliases.json").write_text('{"latest": 2, "best": 2}')
            await until(lambda: running.engine.models.has_failures)
            await callers.go_on()
            tried["broken version published under load"] += 1
        assert callers.failures == []
        assert {version for seen in callers.versions for version in seen} == {1}
