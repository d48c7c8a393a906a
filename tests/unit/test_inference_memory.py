"""What models may take: the budget, who makes room for whom, and what is never loaded."""

import asyncio
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch
from factories import classifier_card
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference import residents
from services.inference.admission import Lobby
from services.inference.loading import Served, ServedClassifier
from services.inference.memory import Footprint, MemoryBudget, machine_memory, tensor_bytes
from services.inference.registry import ServingRegistry, Wiring
from services.inference.runtimes.interface import ClassifierRuntime
from tandem.checkpoints.files import step_directory, write_checkpoint
from tandem.checkpoints.registry import Located, Registry
from tandem.errors import (
    CheckpointCorrupt,
    InvalidRequest,
    MemoryFull,
    ModelTooLarge,
    ModelUnloaded,
    QueueFull,
    TandemError,
    VolumeUnavailable,
)
from tandem.settings import Settings
from tandem.sizes import format_size, parse_size
from tandem.volume import Volume


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_disks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@dataclass
class Bench:
    """A registry of models that take as many bytes as `sizes` says (by name), with a loader that reads nothing."""

    home: Path
    budget: int = 10
    sizes: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    # What a load is expected to take, where that is wrong.
    expected: dict[str, int] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    # The most that was ever counted, and taken.
    peak: int = 0

    def __post_init__(self) -> None:
        self.volume = Volume(self.home)
        wiring = Wiring(self.load, self.expect, lambda served: served.located.label in self.busy)
        self.models = ServingRegistry(Registry(self.volume), wiring, MemoryBudget(self.budget))
        self.alive = 0
        self.num_runs = 0

    def expect(self, located: Located) -> int:
        name = located.version.name if located.version else ""
        return self.expected.get(name, self.size(located))

    def size(self, located: Located) -> int:
        return self.sizes.get(located.version.name if located.version else "", 1)

    async def load(self, located: Located) -> Served:
        self.loads.append(located.label)
        budget = self.models.budget
        self.peak = max(self.peak, budget.num_bytes + budget.lacks(0))
        for _ in range(3):
            await asyncio.sleep(0)
        if located.label in self.broken:
            raise CheckpointCorrupt("a bit is flipped")
        footprint = Footprint(self.size(located))
        return ServedClassifier(located, classifier_card(), cast(ClassifierRuntime, None), footprint=footprint)

    def publish(self, *names: str) -> None:
        for name in names:
            self.num_runs += 1
            checkpoint = step_directory(self.volume.run(f"r{self.num_runs}"), 1)
            write_checkpoint(checkpoint, {"weights": str(self.num_runs).encode()})
            Registry(self.volume).publish(name, "classifier", f"r{self.num_runs}", checkpoint, {"val_acc1": 0.5})

    async def label(self, reference: str) -> str:
        return (await self.models.get(reference)).located.label

    def loaded(self) -> list[str]:
        return [served.located.label for served in self.models.loaded()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_small_ones_make_room_for_a_large_one_the_least_recently_used_first(bench: Bench) -> None:
    bench.sizes = {"large": 8}
    bench.publish("a", "b", "c", "large")
    for name in ("a", "b", "c", "a"):
        await bench.label(name)
    assert await bench.label("large") == "large:1"
    assert bench.loaded() == ["c:1", "a:1", "large:1"]
    assert bench.models.budget.held == 10
    assert bench.peak <= 10


async def test_two_loads_at_once_stay_within_the_budget(bench: Bench) -> None:
    bench.sizes = dict.fromkeys("abcd", 6)
    bench.publish(*"abcd")
    assert await asyncio.gather(*(bench.label(name) for name in "abcd")) == [f"{name}:1" for name in "abcd"]
    assert bench.peak == 6
    assert bench.models.budget.held == 6


async def test_a_model_larger_than_all_memory_is_refused_with_a_line(bench: Bench) -> None:
    bench.sizes = {"huge": 2048}
    bench.publish("m", "huge")
    assert await bench.models.refresh() == {"m": True, "huge": False}
    with pytest.raises(ModelTooLarge, match=r"huge:1 needs about 2.0 KiB .* 10 B on this server: raise TANDEM_MODEL"):
        await bench.models.get("huge")
    assert bench.loads == ["m:1"]


async def test_two_that_do_not_fit_together_are_known_before_the_second_is_waited_for(bench: Bench) -> None:
    bench.sizes = {"a": 6, "b": 5, "c": 4}
    bench.publish(*"abc")
    held = await bench.models.get("a")
    for fits in ("a", "c"):
        await bench.models.check_fits(held, fits)
    with pytest.raises(ModelTooLarge, match=r"a:1 and b:1 do not fit into memory together: they need about 11 B"):
        await bench.models.check_fits(held, "b")
    assert bench.loads == ["a:1"]


async def test_what_was_loaded_ahead_and_is_larger_than_was_expected_goes(bench: Bench) -> None:
    bench.sizes = {"a": 6}
    bench.publish("a")
    await bench.label("a")
    bench.publish("b")
    bench.sizes["b"] = 5
    bench.expected = {"b": 1}
    for _ in range(2):
        # By then it is known what it takes, and it is loaded when somebody asks.
        assert await bench.models.refresh() == {"a": True, "b": True}
        assert bench.loaded() == ["a:1"]
    assert bench.loads == ["a:1", "b:1"]
    assert await bench.label("b") == "b:1"
    assert bench.models.budget.held <= 10


async def test_what_waits_for_loads_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.publish(*"ab")
    monkeypatch.setattr(bench.models, "_lobby", Lobby(num_bytes=1000, num_calls=2))
    waiting = [asyncio.create_task(bench.models.get(name)) for name in "aa"]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="2 calls wait for their models to be loaded; try again in 1 s"):
        await bench.models.get("b")
    await asyncio.gather(*waiting)
    # What is in memory asks for no room there.
    assert await asyncio.gather(*(bench.label("a") for _ in range(5))) == ["a:1"] * 5
    assert await bench.label("b") == "b:1"


async def test_a_newer_version_that_is_too_large_leaves_the_old_one(bench: Bench) -> None:
    bench.publish("m")
    await bench.models.refresh()
    bench.sizes["m"] = 11
    bench.publish("m")
    assert await bench.models.refresh() == {"m": True}
    assert await bench.label("m") == "m:1"


async def test_what_calls_use_counts_until_they_let_go_of_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.sizes = {"a": 6, "b": 6}
    bench.publish("a", "b")
    held = await bench.models.get("a")
    bench.busy = {"a:1"}
    waiting = asyncio.create_task(bench.label("b"))
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert bench.loads == ["a:1"]
    assert bench.models.budget.held == 6
    bench.busy = set()
    del held
    assert await waiting == "b:1"
    assert bench.loaded() == ["b:1"]
    # And who waits too long is told.
    monkeypatch.setattr(residents, "ROOM_WAIT_S", 0.05)
    held = await bench.models.get("b")
    with pytest.raises(MemoryFull, match=r"no room for a:1: it needs about 6 B, and 6 B of 10 B are in use") as caught:
        await bench.models.get("a")
    assert caught.value.retry_after_s == 1
    assert held.located.label == "b:1"
    # It was dropped in vain; since its call keeps it alive, it is there again at once.
    assert await bench.label("b") == "b:1"
    assert bench.loads == ["a:1", "b:1"]


async def test_what_no_call_uses_goes_before_what_was_used_earlier(bench: Bench) -> None:
    bench.sizes = {"c": 9}
    bench.publish("a", "b", "c")
    for name in "ab":
        await bench.label(name)
    bench.busy = {"a:1"}
    assert await bench.label("c") == "c:1"
    assert bench.loaded() == ["a:1", "c:1"]


async def test_what_is_loaded_ahead_pushes_out_nothing_that_callers_use(bench: Bench) -> None:
    bench.sizes = dict.fromkeys(["old", "used", *"pqrstu"], 3)
    bench.publish("old", "used", *"pqr")
    for name in ("old", "used"):
        await bench.label(name)
    for name in "stu":
        bench.publish(name)
        assert all((await bench.models.refresh()).values())
        for _ in range(3):
            assert [await bench.label(name) for name in ("old", "used")] == ["old:1", "used:1"]
            await bench.models.refresh()
    assert [label for label in bench.loads if label in ("old:1", "used:1")] == ["old:1", "used:1"]
    # One of the others had free room; it is the first to go for a caller.
    assert len(bench.loads) == 3
    assert await bench.label("u") == "u:1"
    assert bench.loaded() == ["old:1", "used:1", "u:1"]


async def test_a_swap_pushes_out_nothing_that_was_used_later(bench: Bench) -> None:
    bench.sizes = {"m": 4, "n": 4}
    bench.publish("m", "n")
    for name in "mn":
        await bench.label(name)
    bench.publish("m")
    assert all((await bench.models.refresh()).values())
    # Both of its versions don't fit beside n; the old one made room for the new one.
    assert bench.loaded() == ["m:2", "n:1"]
    assert bench.peak <= 10
    bench.publish("m")
    bench.busy = {"m:2"}
    held = await bench.models.get("m")
    await bench.label("n")
    assert all((await bench.models.refresh()).values())
    assert await bench.label("m") == "m:2", "what calls use goes on, and no caller waits for the new one"
    await bench.label("n")
    bench.busy = set()
    del held
    await bench.models.refresh()
    assert await bench.label("m") == "m:3"
    assert bench.loads == ["m:1", "n:1", "m:2", "m:3"]


async def test_a_broken_version_that_does_not_fit_beside_takes_the_old_one_away_once_at_the_most(bench: Bench) -> None:
    bench.sizes = {"m": 6}
    bench.publish("m")
    await bench.label("m")
    bench.publish("m")
    bench.broken = {"m:2"}
    for _ in range(3):
        assert await bench.models.refresh() == {"m": True}
        assert await bench.label("m") == "m:1"
    assert bench.loads == ["m:1", "m:2", "m:1"]


async def test_while_the_volume_is_gone_nothing_moves_and_statuses_say_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "home", budget=1)
    bench.publish("m", "other")
    await bench.label("m")
    for path in (bench.volume.models, bench.volume.home):
        away = path.with_name(f"{path.name}-away")
        path.rename(away)
        with pytest.raises(VolumeUnavailable):
            await bench.models.refresh()
        assert await bench.label("m") == "m:1"
        for reference in ("other", "m:1"):
            with pytest.raises(VolumeUnavailable, match="the shared volume is not there"):
                await bench.models.get(reference)
        away.rename(path)
        assert await bench.models.refresh() == {"m": True, "other": True}
    assert bench.loads.count("m:1") == 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["get", "unload", "load", "publish", "break", "hold"]), st.sampled_from("abc")),
        st.tuples(st.sampled_from(["refresh", "let go", "pause"]), st.just("")),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=25, deadline=None)
@given(steps=STEPS, sizes=st.lists(st.integers(1, 7), min_size=3, max_size=3))
def test_random_interleavings_keep_to_the_budget_and_end_well(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]], sizes: list[int]
) -> None:
    bench = Bench(tmp_path_factory.mktemp("volume"), 8, dict(zip("abc", sizes, strict=True)))
    bench.publish(*"abc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residents, "ROOM_WAIT_S", 0.02)
        patch.setattr(residents, "FAILURE_MEMORY_S", 0.0)
        asyncio.run(_interleave(bench, steps, patch))


async def _interleave(bench: Bench, steps: list[tuple[str, str]], patch: pytest.MonkeyPatch) -> None:
    tasks: list[asyncio.Task[object]] = []
    held: list[Served] = []

    async def call(name: str, hold: bool) -> None:
        served = await bench.models.get(name)
        assert served.located.version is not None
        assert served.located.version.name == name
        if hold:
            held.append(served)

    for what, name in steps:
        if what in ("get", "hold"):
            tasks.append(asyncio.create_task(call(name, what == "hold")))
        elif what in ("load", "unload"):
            tasks.append(asyncio.create_task(getattr(bench.models, what)(name)))
        elif what == "refresh":
            tasks.append(asyncio.create_task(bench.models.refresh()))
        elif what == "publish":
            bench.publish(name)
        elif what == "break":
            bench.broken.add(f"{name}:{Registry(bench.volume).versions(name)[-1].version}")
        elif what == "let go":
            held.clear()
        else:
            await asyncio.sleep(0.001)
        assert bench.models.budget.lacks(0) <= 0
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    expected = (type(None), ModelUnloaded, MemoryFull, CheckpointCorrupt, ServedClassifier, dict)
    assert all(isinstance(outcome, expected) for outcome in outcomes), outcomes
    outcomes.clear()
    tasks.clear()
    held.clear()
    assert bench.peak <= 8
    # Nobody holds anything now, but a busy machine may take its time to let go.
    patch.setattr(residents, "ROOM_WAIT_S", 60.0)
    # Whatever has happened: what is mended and put back into service answers, in its newest version.
    bench.broken.clear()
    for name in "abc":
        newest = Registry(bench.volume).versions(name)[-1].version
        await bench.models.load(name)
        await bench.models.refresh()
        assert await bench.label(name) == f"{name}:{newest}"
    gc.collect()
    assert bench.models.budget.held == sum(bench.size(served.located) for served in bench.models.loaded())
    await bench.models.close()


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1000", 1000), ("2GiB", 2**31), ("1.5 gb", 1_500_000_000), ("512MiB", 2**29), ("7b", 7), ("3KB", 3000)],
)
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes
    assert Settings.from_environment({"TANDEM_MODEL_MEMORY": text}).model_memory == num_bytes


@pytest.mark.parametrize("text", ["much", "-1", "1e9", "2 PiB", "0", "GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="TANDEM_MODEL_MEMORY"):
        Settings.from_environment({"TANDEM_MODEL_MEMORY": text})


def test_sizes_are_written() -> None:
    sizes = (0, 1023, 1536, 45_200_000, 3 * 2**30)
    assert [format_size(size) for size in sizes] == ["0 B", "1023 B", "1.5 KiB", "43.1 MiB", "3.0 GiB"]


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/a/b\n", {"a/memory.max": "3000\n", "a/b/memory.max": "max\n"}, 3000),
        # In a container: the group is mounted at the root, and goes by the host's path.
        ("0::/docker/x\n", {"memory.max": "4096"}, 4096),
        ("5:cpu:/a\n7:memory:/a\n", {"memory/a/memory.limit_in_bytes": "5000"}, 5000),
        ("0::/\n", {}, None),
    ],
)
def test_the_limit_of_a_control_group_counts(
    tmp_path: Path, membership: str, files: dict[str, str], limit: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    total = machine_memory(tmp_path / "fs", tmp_path / "membership")
    assert total == limit if limit else total > 2**28


def test_shared_tensors_count_once() -> None:
    linear = torch.nn.Linear(10, 10)
    both = torch.nn.ModuleList([linear, torch.nn.Linear(10, 10)])
    cast(torch.nn.Linear, both[1]).weight = linear.weight
    assert tensor_bytes(both) == 4 * (100 + 10 + 10)


def test_errors_of_memory_cross_the_wire() -> None:
    from tandem.wire.status import to_status

    errors: list[Callable[[], TandemError]] = [lambda: MemoryFull("no room", 2.0), lambda: ModelTooLarge("too large")]
    assert [to_status(error()).code.name for error in errors] == ["RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"]
