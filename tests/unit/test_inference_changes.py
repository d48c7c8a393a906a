"""What watchers of the models are told: all first, then each change, and all again where they are too slow."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.inference.changes import Changes, differences, with_public_reasons
from tandem.checkpoints.files import step_directory, write_checkpoint
from tandem.checkpoints.registry import Located, Registry
from tandem.errors import ModelNotFound, QueueFull, Unavailable
from tandem.volume import Volume
from tandem.wire.results import ModelChange, ModelInfo, ModelsSnapshot

Updates = AsyncGenerator[ModelsSnapshot | ModelChange, None]


def document(versions: list[int], **aliases: int) -> dict[str, Any]:
    return {"versions": versions, "aliases": aliases}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, []),
        ({"m": document([1], best=1)}, {"m": document([1], best=1)}, []),
        (
            {},
            {"m": document([1], latest=1)},
            [ModelChange("published", "m", 1), ModelChange("alias_set", "m", 1, "latest")],
        ),
        (
            {"m": document([1], latest=1, old=1)},
            {"m": document([1, 2], latest=2)},
            [
                ModelChange("published", "m", 2),
                ModelChange("alias_set", "m", 2, "latest", 1),
                ModelChange("alias_deleted", "m", 0, "old", 1),
            ],
        ),
        (
            {"m": document([1, 2], best=2), "n": document([4])},
            {"m": document([1], best=1)},
            [
                ModelChange("alias_set", "m", 1, "best", 2),
                ModelChange("withdrawn", "m", 2),
                ModelChange("withdrawn", "n", 4),
            ],
        ),
    ],
)
def test_differences(before: Any, after: Any, expected: list[ModelChange]) -> None:
    assert list(differences(before, after)) == expected


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Volume(tmp_path))


def publish(registry: Registry, name: str, run_id: str) -> Located:
    checkpoint = step_directory(registry.volume.run(run_id), 1)
    write_checkpoint(checkpoint, {"weights": run_id.encode()})
    version = registry.publish(name, "classifier", run_id, checkpoint, {"val_acc1": 0.5})
    return registry.resolve(f"{name}:{version.version}")


async def next_of(updates: Updates) -> Any:
    return await asyncio.wait_for(anext(updates), 120)


async def told(updates: Updates, count: int) -> list[Any]:
    return [await next_of(updates) for _ in range(count)]


async def test_all_models_come_first_and_then_what_happens(registry: Registry) -> None:
    changes = Changes(registry)
    first = publish(registry, "m", "r1")
    updates = changes.watch()
    expected = ModelInfo("m", "classifier", 1, {"latest": 1, "best": 1}, (1,), ())
    assert await next_of(updates) == ModelsSnapshot((expected,))
    changes.tell("loaded", first)
    second = publish(registry, "m", "r2")
    await changes.look()
    changes.tell("failed", second, "a bit is flipped")
    changes.tell("failed", second, "a bit is flipped")
    changes.tell("unloaded", first, "8 versions are the limit")
    assert await told(updates, 5) == [
        ModelChange("loaded", "m", 1),
        ModelChange("published", "m", 2),
        ModelChange("alias_set", "m", 2, "latest", 1),
        ModelChange("failed", "m", 2, reason="a bit is flipped"),
        ModelChange("unloaded", "m", 1, reason="8 versions are the limit"),
    ]
    assert changes.model("m").failed == {2: "a bit is flipped"}
    changes.unloaded("m")
    assert (await next_of(updates)).version == 0
    assert changes.model("m").out_of_service
    changes.tell("loaded", second)
    assert changes.model("m") == ModelInfo("m", "classifier", 2, {"latest": 2, "best": 1}, (1, 2), (2,))
    with pytest.raises(ModelNotFound):
        changes.model("nope")
    await updates.aclose()


async def test_without_models_the_first_is_empty(registry: Registry) -> None:
    changes = Changes(registry)
    updates = changes.watch()
    assert await next_of(updates) == ModelsSnapshot(())
    publish(registry, "m", "r1")
    await changes.look()
    assert await next_of(updates) == ModelChange("published", "m", 1)
    await updates.aclose()


async def test_checkpoints_of_runs_are_no_versions(registry: Registry) -> None:
    changes = Changes(registry)
    located = publish(registry, "m", "r1")
    await changes.look()
    updates = changes.watch()
    await next_of(updates)
    changes.tell("loaded", Located(located.checkpoint, None, "r1", None))
    changes.tell("loaded", located)
    assert await next_of(updates) == ModelChange("loaded", "m", 1)
    await updates.aclose()


async def test_a_slow_watcher_gets_all_models_anew_and_disturbs_nobody(registry: Registry) -> None:
    changes = Changes(registry, max_changes=5)
    located = publish(registry, "m", "r1")
    await changes.look()
    slow, quick = changes.watch(), changes.watch()
    await next_of(slow)
    await next_of(quick)
    for number in range(6):
        changes.tell("loaded" if number % 2 else "unloaded", located)
        assert isinstance(await next_of(quick), ModelChange)
    changes.tell("unloaded", located)
    snapshot = await next_of(slow)
    # It has the last change too, which is not told twice.
    assert isinstance(snapshot, ModelsSnapshot)
    assert snapshot.models[0].loaded == ()
    changes.tell("loaded", located)
    assert await next_of(slow) == ModelChange("loaded", "m", 1)
    await slow.aclose()
    await quick.aclose()


async def test_watchers_are_bounded_and_ended(registry: Registry) -> None:
    changes = Changes(registry, max_watchers=2)
    await changes.look()
    first, second = changes.watch(), changes.watch()
    await next_of(first)
    await next_of(second)
    with pytest.raises(QueueFull, match="2 callers watch"):
        await next_of(changes.watch())
    await first.aclose()
    third = changes.watch()
    assert isinstance(await next_of(third), ModelsSnapshot)
    waiting = asyncio.create_task(next_of(second))
    await asyncio.sleep(0)
    changes.close()
    for ended in (waiting, next_of(third), next_of(changes.watch())):
        with pytest.raises(Unavailable, match="stopping"):
            await ended


def test_reasons_are_as_callers_may_see_them() -> None:
    public = str.upper
    change = ModelChange("failed", "m", 1, reason="path")
    assert with_public_reasons(change, public) == replace(change, reason="PATH")
    model = ModelInfo("m", "classifier", 1, {}, (1,), (), {1: "path"})
    assert with_public_reasons(ModelsSnapshot((model,)), public) == ModelsSnapshot(
        (replace(model, failed={1: "PATH"}),)
    )
