"""The table of loaded models, with a loader that reads nothing: what is served, and when it is swapped."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from factories import classifier_card
from grpc_health.v1 import health_pb2
from waiting import until

from services.inference import residents as module
from services.inference import watch
from services.inference.health import HealthBoard
from services.inference.loading import Served, ServedClassifier
from services.inference.memory import Footprint, MemoryBudget
from services.inference.registry import ServingRegistry, Wiring
from services.inference.runtimes.interface import ClassifierRuntime
from services.inference.watch import scan, watch_volume
from tandem.checkpoints.files import step_directory, write_checkpoint, write_pointer
from tandem.checkpoints.registry import Located, Registry
from tandem.errors import CheckpointCorrupt, InvalidReference, InvalidRequest, MemoryFull, ModelNotFound, ModelUnloaded
from tandem.volume import Volume


@dataclass
class FakeLoader:
    """Loads nothing; refuses the labels in `broken`, and waits at `gate` where there is one."""

    loads: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    crashing: set[str] = field(default_factory=set)
    gate: asyncio.Event | None = None
    # By label, for those that wait at one of their own.
    gates: dict[str, asyncio.Event] = field(default_factory=dict)

    async def __call__(self, located: Located) -> Served:
        self.loads.append(located.label)
        if located.label in self.gates:
            await self.gates[located.label].wait()
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if located.label in self.crashing:
            raise MemoryError("no room")
        if located.label in self.broken:
            raise CheckpointCorrupt("a bit is flipped")
        return ServedClassifier(located, classifier_card(), cast(ClassifierRuntime, None), footprint=Footprint(1))


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path)


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()


@pytest.fixture
def models(volume: Volume, loader: FakeLoader) -> ServingRegistry:
    """Versions take a byte each; three fit."""
    return ServingRegistry(Registry(volume), Wiring(loader, needed_bytes=lambda _: 1), MemoryBudget(3))


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
    assert loader.loads == ["m:1", "m:2"]
    # The old one has gone; whoever asks for it by its number gets it.
    assert models.loaded_versions("m") == (2,)
    assert await label(models, "m:1") == "m:1"
    assert models.loaded_versions("m") == (1, 2)


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


async def test_what_is_published_during_a_first_load_is_not_lost(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m")
    loader.gate = asyncio.Event()
    first = asyncio.create_task(label(models, "m"))
    while not loader.loads:
        await asyncio.sleep(0.01)
    publish("m")
    refreshing = asyncio.create_task(models.refresh())
    while len(loader.loads) < 2:
        await asyncio.sleep(0.01)
    # The newer one is ready first, as it is where the older is the larger.
    await asyncio.sleep(0.05)
    loader.gate.set()
    assert await refreshing == {"m": True}
    assert await first == "m:2"
    assert await label(models, "m") == "m:2"


async def test_what_is_promoted_during_a_first_load_is_followed_without_a_refresh(
    models: ServingRegistry, volume: Volume, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m", "m")
    loader.gate = asyncio.Event()
    first = asyncio.create_task(label(models, "m@best"))
    while not loader.loads:
        await asyncio.sleep(0.01)
    (volume.model("m") / "aliases.json").write_text('{"latest": 2, "best": 2}')
    loader.gate.set()
    assert await first == "m:2"
    assert await label(models, "m@best") == "m:2"
    assert loader.loads == ["m:1", "m:2"]


async def test_runs_count_among_what_is_loaded(models: ServingRegistry, publish: Callable[..., None]) -> None:
    publish("a", "b", "c", "d", "e")
    for number in range(5):
        assert await label(models, f"run:r{number}") == f"run:r{number}/1"
        assert len(models.loaded()) <= 3
    await asyncio.gather(*(label(models, name) for name in "abcde"))
    assert len(models.loaded()) == 3
    assert {served.located.label for served in models._pointers.values()} <= {
        served.located.label for served in models.loaded()
    }


@pytest.mark.parametrize("damage", ["aliases.json", "versions/0001.json"])
async def test_a_damaged_model_hides_no_other_and_is_spoken_of_once(
    models: ServingRegistry,
    volume: Volume,
    publish: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    publish("good", "bad")
    assert await models.refresh() == {"good": True, "bad": True}
    whole = (volume.model("bad") / damage).read_bytes()
    (volume.model("bad") / damage).write_text("{")
    (volume.models / "not a name" / "versions").mkdir(parents=True)
    (volume.models / "not a name" / "versions" / "0001.json").write_text("{")
    publish("good")
    for _ in range(3):
        assert await models.refresh() == {"good": True, "bad": True}
    assert await label(models, "good") == "good:2"
    # What was loaded whole goes on being served.
    assert await label(models, "bad") == "bad:1"
    (record,) = caplog.records
    assert record.getMessage().startswith("bad@latest can't be followed")
    assert record.exc_info is None
    assert models.has_failures
    (volume.model("bad") / damage).write_bytes(whole)
    await models.refresh()
    assert not models.has_failures


async def test_a_load_that_fails_in_an_unknown_way_stops_no_refresh(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    publish("good", "bad")
    loader.crashing = {"bad:1"}
    for _ in range(2):
        assert await models.refresh() == {"good": True, "bad": False}
    (record,) = caplog.records
    assert record.exc_info is not None


async def test_a_task_that_dies_is_said_once_and_started_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "RESTART_S", 0.001)
    starts = []

    async def start() -> None:
        starts.append(1)
        if len(starts) < 5:
            raise ZeroDivisionError("a bug")
        await asyncio.sleep(60)

    task = asyncio.create_task(watch.keep_running("the watch", start))
    while len(starts) < 5:
        await asyncio.sleep(0.01)
    (record,) = caplog.records
    assert record.exc_info
    assert "the watch failed" in record.getMessage()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


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


async def test_an_unloaded_model_is_out_of_service_until_it_is_loaded(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m", "other")
    assert await models.refresh() == {"m": True, "other": True}
    await models.unload("m")
    assert models.loaded_versions("m") == ()
    for reference in ("m", "m:1", "m@latest"):
        with pytest.raises(ModelUnloaded, match="load it"):
            await models.get(reference)
    publish("m")
    assert await models.refresh() == {"m": False, "other": True}
    assert loader.loads.count("m:2") == 0
    assert (await models.load("m")).located.label == "m:2"
    assert await label(models, "m") == "m:2"
    with pytest.raises(ModelNotFound):
        await models.unload("nobody")


async def test_a_model_that_is_unloaded_during_its_load_stays_out(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m")
    loader.gate = asyncio.Event()
    caller = asyncio.create_task(models.get("m"))
    while not loader.loads:
        await asyncio.sleep(0)
    await models.unload("m")
    loader.gate.set()
    assert (await caller).located.label == "m:1", "whoever came before is answered"
    assert models.loaded_versions("m") == ()
    with pytest.raises(ModelUnloaded):
        await models.get("m")


async def test_what_is_mended_is_loaded_at_once_when_it_is_asked_for(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m")
    loader.broken.add("m:1")
    with pytest.raises(CheckpointCorrupt):
        await models.load("m")
    loader.broken.clear()
    assert (await models.load("m")).located.label == "m:1"


async def test_what_is_got_ahead_makes_nothing_go_and_goes_first(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("a", "b", "c", "d", "d")
    await models.get("a")
    candidate = await models.get_ahead("d@latest")
    assert candidate.located.label == "d:2"
    assert models.has(candidate)
    publish("d")
    assert await models.get_ahead("d:2") is candidate, "it stays with its version"
    await models.get("b")
    with pytest.raises(MemoryFull):
        await models.get_ahead("c")
    assert {each.located.label for each in models.loaded()} == {"a:1", "b:1", "d:2"}
    del candidate
    await models.get("c")
    assert {each.located.label for each in models.loaded()} == {"a:1", "b:1", "c:1"}
    for reference, error in (("run:r0/1", InvalidRequest), ("e", ModelNotFound), ("d:9", ModelNotFound)):
        with pytest.raises(error):
            await models.get_ahead(reference)
    await models.unload("d")
    with pytest.raises(ModelUnloaded):
        await models.get_ahead("d:1")


async def test_while_one_loads_the_others_are_followed_and_told_of(
    models: ServingRegistry,
    volume: Volume,
    loader: FakeLoader,
    publish: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "SCAN_INTERVAL_S", 0.01)
    health, served = HealthBoard(), list[dict[str, bool]]()
    models.on_answers = health.model

    async def refreshed(serving: dict[str, bool]) -> None:
        await health.models(serving)
        served.append(serving)

    def status(name: str) -> str:
        found = cast(Any, health.servicer)._server_status.get(f"models/{name}")
        return "" if found is None else str(health_pb2.HealthCheckResponse.ServingStatus.Name(found))

    gate = loader.gates["slow:1"] = asyncio.Event()
    publish("words", "gone", "slow")
    watching = asyncio.create_task(watch_volume(models, volume.models, refreshed))
    await until(lambda: status("words") == status("gone") == "SERVING")
    await until(lambda: "slow:1" in loader.loads)
    await models.unload("words")
    assert status("words") == "NOT_SERVING", "at once: its calls are refused from now on"
    publish("later")
    await until(lambda: status("later") == "SERVING")
    volume.model("gone").rename(volume.home / "gone")
    await until(lambda: status("gone") == "SERVICE_UNKNOWN")
    publish("gone", "later")
    await until(lambda: models.loaded_versions("later") == (2,))
    await models.load("words")
    assert status("words") == "SERVING"
    await models.unload("words")
    assert (status("slow"), served) == ("", []), "not ready before all are loaded that were there"
    gate.set()
    await until(lambda: status("slow") == "SERVING" and served)
    assert status("words") == "NOT_SERVING", "what was found before it was unloaded is not told after"
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    await models.close()


async def test_two_load_at_once_and_no_caller_stands_behind_the_rest(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("a", "b", "c")
    monkeypatch.setattr(models, "_newest_first", lambda: ["c", "b", "a"])
    loader.gates = {f"{name}:1": asyncio.Event() for name in "bc"}
    refreshing = asyncio.create_task(models.refresh())
    await until(lambda: len(loader.loads) == 2)
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert sorted(loader.loads) == ["b:1", "c:1"], "as many as there are loaders"
    assert await label(models, "a") == "a:1"
    loader.gates["b:1"].set()
    loader.gates["c:1"].set()
    assert await refreshing == {"a": True, "b": True, "c": True}
    assert sorted(loader.loads) == ["a:1", "b:1", "c:1"]


async def test_the_newest_have_the_room_whichever_is_looked_at_first(
    volume: Volume, loader: FakeLoader, publish: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "abcdef"
    publish(*names)
    chance = random.Random(3)

    def needed_bytes(_: Located) -> int:
        time.sleep(chance.random() / 500)
        return 1

    for _ in range(10):
        loader.loads.clear()
        models = ServingRegistry(Registry(volume), Wiring(loader, needed_bytes), MemoryBudget(3))
        monkeypatch.setattr(models, "_newest_first", lambda: list(reversed(names)))
        assert await models.refresh() == dict.fromkeys(names, True)
        assert sorted(loader.loads) == ["d:1", "e:1", "f:1"]


async def test_what_is_published_during_a_refresh_is_followed_by_the_next(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None]
) -> None:
    publish("m")
    gate = loader.gates["m:1"] = asyncio.Event()
    refreshing = asyncio.create_task(models.refresh())
    await until(lambda: loader.loads)
    others = [asyncio.create_task(models.refresh()) for _ in range(5)]
    publish("m")
    others.append(asyncio.create_task(models.refresh()))
    for _ in range(50):
        await asyncio.sleep(0.001)
    gate.set()
    assert await asyncio.gather(refreshing, *others) == [{"m": True}] * 7
    assert await label(models, "m") == "m:2"
    assert loader.loads == ["m:1", "m:2"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that failures are counted by."""
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


async def test_a_failed_version_is_tried_again_after_ever_longer_waits(
    models: ServingRegistry, loader: FakeLoader, publish: Callable[..., None], clock: list[float]
) -> None:
    publish("m")
    loader.broken = {"m:1"}
    tried_at, begun_at = list[float](), clock[0]
    for _ in range(200):
        num_before = len(loader.loads)
        await models.refresh()
        tried_at += [clock[0] - begun_at] * (len(loader.loads) - num_before)
        clock[0] += 10
    assert tried_at == [0, 10, 30, 70, 150, 310, 630, 950, 1270, 1590, 1910]
    # Withdrawn, it is forgotten.
    models.registry.volume.model("m").rename(models.registry.volume.home / "gone")
    assert models.has_failures
    clock[0] += 601
    await models.refresh()
    assert not models.has_failures


async def test_a_failed_version_is_tried_at_once_when_its_files_change(
    models: ServingRegistry, volume: Volume, loader: FakeLoader, publish: Callable[..., None], clock: list[float]
) -> None:
    publish("m")
    loader.broken = {"m:1"}
    for _ in range(3):
        await models.refresh()
        clock[0] += 1000
    await models.refresh()
    assert len(loader.loads) == 4
    assert not await models.find_mended()
    # By a caller, who looks before the watch does.
    weights = step_directory(volume.run("r0"), 1) / "weights"
    weights.write_bytes(b"other bytes")
    with pytest.raises(CheckpointCorrupt):
        await models.get("m")
    assert len(loader.loads) == 5
    with pytest.raises(CheckpointCorrupt):
        await models.get("m")
    assert len(loader.loads) == 5
    # These are others: they are waited for as long as those were at first.
    clock[0] += 10
    await models.refresh()
    assert len(loader.loads) == 6
    # And by the watch.
    weights.write_bytes(b"mended")
    loader.broken.clear()
    assert await models.find_mended()
    assert not await models.find_mended(), "it is said once for each change"
    assert await models.refresh() == {"m": True}
    assert not models.has_failures
