"""The table of loaded models, with a loader that reads nothing: what is served, and when it is swapped."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from factories import classifier_card

from services.inference import registry as module
from services.inference.loading import Served, ServedClassifier
from services.inference.registry import ServingRegistry
from services.inference.runtimes.interface import ClassifierRuntime
from services.inference.watch import scan
from tandem.checkpoints.files import step_directory, write_checkpoint, write_pointer
from tandem.checkpoints.registry import Located, Registry
from tandem.errors import CheckpointCorrupt, InvalidReference, ModelNotFound
from tandem.volume import Volume


@dataclass
class FakeLoader:
    """Loads nothing; refuses the labels in `broken`, and waits at `gate` where there is one."""

    loads: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    gate: asyncio.Event | None = None

    async def __call__(self, located: Located) -> Served:
        self.loads.append(located.label)
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if located.label in self.broken:
            raise CheckpointCorrupt("a bit is flipped")
        return ServedClassifier(located, classifier_card(), cast(ClassifierRuntime, None))


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path)


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def models(volume: Volume, loader: FakeLoader) -> ServingRegistry:
    return ServingRegistry(Registry(volume), loader, max_loaded=3)


@pytest.fixture
def publish(volume: Volume) -> Callable[..., None]:
    counter = iter(range(1000))

    def publish(*names: str) -> None:
        for name in names:
            run_id = f"r{next(counter)}"
            checkpoint = step_directory(volume.run(run_id), 1)
            write_checkpoint(checkpoint, {"weights": run_id.encode()})
            write_pointer(volume.run(run_id), "latest", checkpoint, {})
            Registry(volume).publish(name, "classifier", run_id, checkpoint, {"val_acc1": 0.5})

    return publish


async def label(models: ServingRegistry, reference: str) -> str:
    return (await models.get(reference)).located.label


async def test_loads_on_demand_and_once(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m")
    assert set(await asyncio.gather(*(label(models, text) for text in ["m", "m:1", "m@latest", "m@best"] * 20))) == {
        "m:1"
    }
    assert loader.loads == ["m:1"]
    assert models.loaded_versions("m") == (1,)


async def test_a_caller_who_leaves_does_not_end_the_load(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m")
    loader.gate = asyncio.Event()
    first, second = asyncio.create_task(label(models, "m")), asyncio.create_task(label(models, "m"))
    while not loader.loads:
        await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    loader.gate.set()
    assert await second == "m:1"
    assert loader.loads == ["m:1"]


async def test_the_old_one_answers_until_the_new_one_is_loaded(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m")
    assert await models.refresh() == {"m": True}
    publish("m")
    loader.gate = asyncio.Event()
    refreshing = asyncio.create_task(models.refresh())
    while len(loader.loads) < 2:
        await asyncio.sleep(0.01)
    assert await label(models, "m") == "m:1"
    loader.gate.set()
    assert await refreshing == {"m": True}
    assert await label(models, "m") == "m:2"
    assert await label(models, "m:1") == "m:1"
    assert loader.loads == ["m:1", "m:2"]


async def test_a_broken_version_is_refused_and_the_old_one_goes_on(
    models: ServingRegistry,
    loader: FakeLoader,
    publish: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish("m")
    await models.refresh()
    publish("m")
    loader.broken = {"m:2"}
    with caplog.at_level(logging.INFO):
        assert await models.refresh() == {"m": True}
        assert await models.refresh() == {"m": True}
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "m:2 can't be loaded" in caplog.text
    assert await label(models, "m") == "m:1"
    with pytest.raises(CheckpointCorrupt, match="m:2 can't be served: a bit is flipped"):
        await models.get("m:2")
    assert loader.loads == ["m:1", "m:2"]
    # Mended, it is found again.
    loader.broken = set()
    monkeypatch.setattr(module, "FAILURE_MEMORY_S", 0.0)
    assert models.has_failures
    await models.refresh()
    assert await label(models, "m") == "m:2"
    assert not models.has_failures


async def test_a_server_that_starts_on_a_broken_version_falls_back(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m", "m", "m", "alone")
    loader.broken = {"m:2", "m:3", "alone:1"}
    assert await models.refresh() == {"m": True, "alone": False}
    assert await label(models, "m") == "m:1"
    with pytest.raises(CheckpointCorrupt):
        await models.get("alone")


async def test_the_least_recently_used_goes_and_comes_back(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("a", "b", "c", "d")
    for name in ("a", "b", "c", "a", "d"):
        await models.get(name)
    assert [models.loaded_versions(name) for name in "abcd"] == [(1,), (), (1,), (1,)]
    assert await label(models, "b") == "b:1"
    assert loader.loads == ["a:1", "b:1", "c:1", "d:1", "b:1"]


async def test_more_models_than_fit_are_served_on_demand(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("a", "b", "c", "d", "e")
    assert await models.refresh() == dict.fromkeys("abcde", True)
    assert len(loader.loads) == 3
    for name in "abcde":
        assert await label(models, name) == f"{name}:1"


async def test_what_is_not_there_appears_and_goes(
    models: ServingRegistry, volume: Volume, publish: Callable[..., None]
) -> None:
    with pytest.raises(ModelNotFound):
        await models.get("m")
    with pytest.raises(InvalidReference):
        await models.get("../m")
    publish("m")
    assert await label(models, "m") == "m:1"
    volume.model("m").rename(volume.home / "gone")
    assert await models.refresh() == {}
    with pytest.raises(ModelNotFound):
        await models.get("m")


async def test_aliases_move(models: ServingRegistry, volume: Volume, publish: Callable[..., None]) -> None:
    publish("m", "m")
    assert await label(models, "m@best") == "m:1"
    (volume.model("m") / "aliases.json").write_text('{"latest": 2, "best": 2}')
    await models.refresh()
    assert await label(models, "m@best") == "m:2"


async def test_runs_are_looked_up_each_time(
    models: ServingRegistry, volume: Volume, publish: Callable[..., None]
) -> None:
    publish("m")
    assert await label(models, "run:r0") == "run:r0/1"
    newer = step_directory(volume.run("r0"), 2)
    write_checkpoint(newer, {"weights": b"newer"})
    write_pointer(volume.run("r0"), "latest", newer, {})
    assert await label(models, "run:r0") == "run:r0/2"


def test_a_scan_sees_each_change(volume: Volume, publish: Callable[..., None]) -> None:
    assert scan(volume.models) is None
    seen = []
    for _ in range(5):
        publish("m")
        seen.append(scan(volume.models))
    (volume.model("m") / "aliases.json").unlink()
    seen.append(scan(volume.models))
    assert len(set(seen)) == 6
    assert scan(volume.models) == seen[-1]
