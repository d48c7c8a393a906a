"""Shadows without a server: which calls are chosen, what is dropped and why, and when one ends."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from factories import CLASS_IDS, classifier_card, png
from prometheus_client import generate_latest
from torch import Tensor
from waiting import PATIENCE_S, held, until

from services.inference import shadow as state
from services.inference import shadow_runs, shadows
from services.inference.aside import Aside, Closed, TookTooLong
from services.inference.classify import GivenImage
from services.inference.counts import CallCounts, LoadCounts
from services.inference.decoding import Batch, Decoder
from services.inference.devices import Devices
from services.inference.loading import ServedClassifier
from services.inference.metrics import ServerMetrics, make_registry
from services.inference.scheduler import DeviceScheduler
from services.inference.shadow import Shadow, Terms
from services.inference.shadows import Shadows
from tandem.checkpoints.references import ModelReference
from tandem.checkpoints.registry import Located, Version
from tandem.errors import Conflict, InvalidRequest, LimitExceeded, ModelNotFound
from tandem.wire.limits import MAX_SHADOWS

SIZE = 4


@dataclass(eq=False)
class Runtime:
    """Names the class that the first value of an image says; remembers the sizes of its batches."""

    shift: int = 0
    before: Callable[[], object] = lambda: None
    batches: list[int] = field(default_factory=list)
    name: str = "eager"
    dtype: str = "float32"

    def predict(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        self.before()
        named = (pixels[:, 0, 0, 0].long() + self.shift) % len(CLASS_IDS)
        return torch.nn.functional.one_hot(named, len(CLASS_IDS)).float() * 3

    def warm(self) -> None:
        pass


def served(number: int, runtime: Runtime | None = None, classes: Any = CLASS_IDS, size: int = SIZE) -> ServedClassifier:
    version = Version("m", number, "classifier", f"r{number}", f"c{number}", f"{number}", {}, "")
    card = classifier_card(classes=classes)
    card = card.model_copy(update={"preprocessing": card.preprocessing.model_copy(update={"image_size": size})})
    return ServedClassifier(Located(Path(f"c{number}"), f"{number}", f"r{number}", version), card, runtime or Runtime())


class Models:
    """What the shadows ask of the registry; all that is in `memory` is loaded."""

    def __init__(self, *memory: ServedClassifier) -> None:
        self.memory = {f"m:{each.located.version.version}": each for each in memory if each.located.version}
        self.aliases = {"m@production": "m:1", "m@latest": "m:1"}
        self.unloaded: set[str] = set()
        self.changes = SimpleNamespace(leads=lambda name, alias: f"{name}@{alias}" in self.aliases)

    async def get(self, reference: str) -> ServedClassifier:
        if reference not in self.aliases:
            raise ModelNotFound(reference)
        return self.memory[self.aliases[reference]]

    async def get_ahead(self, reference: str) -> ServedClassifier:
        if reference not in self.memory:
            raise ModelNotFound(reference)
        return self.memory[reference]

    def pointed(self, reference: ModelReference) -> ServedClassifier | None:
        return self.memory.get(self.aliases.get(f"{reference.name}@{reference.alias}", ""))

    def has(self, served: ServedClassifier) -> bool:
        return any(served is each for each in self.memory.values())

    def is_unloaded(self, name: str) -> bool:
        return name in self.unloaded


@dataclass
class House:
    """Shadows with a device, and the two models."""

    models: Models
    scheduler: DeviceScheduler
    shadows: Shadows
    runtimes: tuple[Runtime, Runtime]
    start: Callable[..., Any]

    async def call(self, *firsts: int, reference: str = "m@production", label: str = "") -> None:
        """Hand over a call whose images begin with these values, and let the loop take it."""
        pixels = torch.zeros(len(firsts), 3, SIZE, SIZE, dtype=torch.uint8)
        pixels[:, 0, 0, 0] = torch.tensor(firsts, dtype=torch.uint8)
        images = [GivenImage(f"{first}", png(first), label) for first in firsts]
        batch = Batch((pixels,), tuple(range(len(firsts))), ("",) * len(firsts), 0.0)
        self.shadows.offer(reference, await self.models.get(self.of(reference)), images, batch)
        await asyncio.sleep(0)

    def of(self, reference: str) -> str:
        return reference if reference in self.models.aliases else "m@latest"


@asynccontextmanager
async def house(shift: int = 0, **of_candidate: Any) -> AsyncIterator[House]:
    runtimes = Runtime(), Runtime(shift)
    models = Models(served(1, runtimes[0]), served(2, runtimes[1], **of_candidate))
    scheduler, decoder = DeviceScheduler(torch.device("cpu")), Decoder(1)
    all_shadows = Shadows(cast(Any, models), Devices([scheduler]), decoder)

    async def start(share: float = 1.0, alias: str = "production", candidate: str = "m:2") -> Shadow:
        return await all_shadows.start(Terms("m", alias, share), candidate)

    task = asyncio.create_task(all_shadows.run())
    try:
        yield House(models, scheduler, all_shadows, runtimes, start)
    finally:
        task.cancel()
        all_shadows.close()
        scheduler.close()
        decoder.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine nothing is to be dropped because it takes long; tests that want that say so."""
    monkeypatch.setattr(shadow_runs, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(shadow_runs, "MAX_HOLD_S", PATIENCE_S)
    monkeypatch.setattr(state, "BATCH_S", PATIENCE_S)


def make_shadow(share: float = 1.0) -> Shadow:
    return Shadow(Terms("m", "production", share), served(1), served(2))


def why_ended(shadow: Shadow) -> str:
    # By a call: the checker of types takes an attribute for as it was.
    return shadow.ended


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1, 0.3, 0.004])
def test_the_share_is_chosen_evenly(share: float) -> None:
    shadow = make_shadow(share)
    chosen = [number for number in range(1000) if shadow.chooses(3)]
    assert len(chosen) == pytest.approx(1000 * share, abs=1)
    gaps = {after - before for before, after in pairwise(chosen)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert (shadow.num_seen, shadow.num_chosen) == (3000, 3 * len(chosen))


def test_whose_calls_they_are() -> None:
    assert Terms("m", "production", 1).written == ("m@production",)
    assert Terms("m", "latest", 1).written == ("m@latest", "m"), "a name alone is its latest"


def test_batches_grow_while_they_are_quick_and_shrink_when_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "BATCH_S", 0.025)
    shadow, sizes = make_shadow(), []
    for slower_s in (0.01, 0.011, 0.012, 0.012, 0.02, 0.03, 0.03, 0.03):
        shadow.recorded(1, slower_s)
        sizes.append(shadow.batch_size)
    assert sizes == [2, 4, 8, 8, 8, 4, 2, 1]


def test_several_batches_in_a_row_that_come_to_nothing_end_it() -> None:
    shadow = make_shadow()
    shadow.trouble(8, "failed")
    for _ in range(state.MAX_TROUBLES - 1):
        shadow.trouble(1, "slow")
        shadow.recorded(1, 0.0)
    assert not why_ended(shadow), "not in a row"
    for _ in range(state.MAX_TROUBLES):
        shadow.trouble(1, "slow")
    assert shadow.ended == "5 batches in a row came to nothing; the last one took too long"
    shadow.end("something else")
    assert "in a row" in shadow.ended, "the first reason"


def test_what_is_recorded_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_SHADOW_IMAGES", 10)
    shadow = make_shadow()
    shadow.recorded(8, 0.0)
    assert not why_ended(shadow)
    shadow.recorded(2, 0.0)
    assert shadow.ended == "it has seen 10 images, which are enough"


def test_work_aside_returns_or_raises() -> None:
    aside = Aside("test")
    assert aside.run(lambda: 7, PATIENCE_S) == 7
    assert aside.run(threading.current_thread, PATIENCE_S).name == "test"
    with pytest.raises(ZeroDivisionError):
        aside.run(lambda: 1 // 0, PATIENCE_S)
    assert aside.run(lambda: 8, PATIENCE_S) == 8, "also after an error"
    thread = aside.run(threading.current_thread, PATIENCE_S)
    aside.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    with pytest.raises(Closed):
        aside.run(lambda: 7, PATIENCE_S)


def test_work_aside_is_not_waited_for_for_ever() -> None:
    aside, opened = Aside("test"), threading.Event()
    with pytest.raises(TookTooLong):
        aside.run(lambda: opened.wait(PATIENCE_S), 0.001)
    with pytest.raises(TookTooLong):
        # At once: that of before goes on.
        aside.run(lambda: 7, PATIENCE_S)
    opened.set()
    assert aside._pending is not None
    assert aside._pending.result(PATIENCE_S)
    assert aside.run(lambda: 7, PATIENCE_S) == 7
    aside.close()


async def test_both_models_see_the_chosen_images_in_small_batches() -> None:
    async with house(shift=1) as each:
        shadow = await each.start()
        for firsts in ([0, 1, 2], list(range(40))):
            await each.call(*firsts, label=CLASS_IDS[0])
        await until(lambda: shadow.num_recorded == 43)
        report = shadow.report()
        assert (report.num_seen, report.num_shadowed, report.num_waiting) == (43, 43, 0)
        assert report.summary.num_disagreements == 43
        table = report.summary.labelled
        assert table is not None
        # Every fifth image begins with the class of the label, or with the one before it.
        assert (table.only_a_right, table.only_b_right, table.both_right) == (9, 8, 0)
        for runtime in each.runtimes:
            assert sum(runtime.batches) == 43
            assert max(runtime.batches) == state.MAX_BATCH


async def test_calls_of_other_references_are_nobodys() -> None:
    async with house() as each:
        shadow = await each.start(alias="latest")
        for reference in ("m@production", "m:1", "other"):
            await each.call(1, reference=reference)
        assert shadow.num_seen == 0
        for reference in ("m", "m@latest"):
            await each.call(1, reference=reference)
        assert shadow.num_seen == 2


async def test_while_a_device_has_work_nothing_is_run_and_then_it_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_runs, "PATIENCE_S", 0.01)
    async with house() as each:
        shadow = await each.start()
        with each.scheduler.admit(1, each.runtimes[0]):
            await each.call(1, 2, 3)
            await each.call(4)
            await until(lambda: shadow.num_dropped["busy"])
        assert shadow.num_dropped == {**dict.fromkeys(state.REASONS, 0), "busy": 4}
        assert each.runtimes[1].batches == []
        assert (each.shadows.num_images, each.shadows.num_bytes) == (0, 0)


async def test_a_job_that_gets_no_turn_is_given_up_and_counts_for_no_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    async with house() as each:
        monkeypatch.setattr(shadow_runs, "PATIENCE_S", 0.01)
        shadow = await each.start()
        # Held without a place, as by a load that warms a model.
        async with held(each.scheduler):
            await each.call(1)
            await until(lambda: shadow.num_dropped["busy"] == 1)
            assert not each.scheduler.is_wanted
        # What is late in the queue of a device sheds calls.
        assert not any(each.scheduler.refusals().values())
        assert each.runtimes[1].batches == []


async def test_between_batches_it_leaves_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with house() as each:
        shadow = await each.start()
        # For good, as it were.
        monkeypatch.setattr(shadow_runs, "REST", 10**9)
        await each.call(1, 2)
        await until(lambda: shadow.num_recorded == 1)
        for _ in range(20):
            await each.scheduler.run(lambda: None)
        assert [runtime.batches for runtime in each.runtimes] == [[1], [1]]
        assert shadow.report().num_waiting == 1


async def test_a_job_that_has_its_turn_after_the_end_holds_nothing() -> None:
    async with house() as each:
        shadow = await each.start()
        async with held(each.scheduler):
            await each.call(1)
            await until(lambda: each.scheduler.is_wanted)
            each.shadows.stop("m", "production")
        # Else it would wait for what nobody does.
        await until(lambda: shadow.num_dropped["ended"] == 1)
        await each.scheduler.run(lambda: None)


@pytest.mark.parametrize("bound", ["MAX_WAITING_IMAGES", "MAX_WAITING_BYTES"])
async def test_what_waits_is_bounded(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, bound, 10 if bound == "MAX_WAITING_IMAGES" else 10 * 3 * SIZE**2)
    async with house() as each:
        shadow = await each.start()
        with each.scheduler.admit(1, each.runtimes[0]):
            for _ in range(30):
                await each.call(1, 2, 3)
            assert shadow.num_dropped["full"] == 81
            assert (each.shadows.num_images, shadow.report().num_waiting) == (9, 9)
        await until(lambda: shadow.num_recorded == 9)
        assert (each.shadows.num_images, each.shadows.num_bytes) == (0, 0)
        await each.call(1)
        await until(lambda: shadow.num_recorded == 10)


async def test_a_candidate_that_fails_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with house() as each:
        shadow = await each.start()
        each.runtimes[1].before = lambda: 1 // 0
        for _ in range(state.MAX_TROUBLES):
            await each.call(1)
        await until(lambda: shadow.ended)
        assert shadow.num_dropped["failed"] == state.MAX_TROUBLES
        assert "the last one failed" in shadow.ended
        assert caplog.text.count("ZeroDivisionError") == 1
        await each.call(1)
        assert shadow.num_seen == state.MAX_TROUBLES, "it has ended"


async def test_a_candidate_that_hangs_holds_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    async with house() as each:
        shadow = await each.start()
        each.runtimes[1].before = lambda: opened.wait(PATIENCE_S)
        monkeypatch.setattr(shadow_runs, "MAX_HOLD_S", 0.5)
        try:
            await each.call(1)
            await until(lambda: shadow.num_dropped["slow"] == 1)
            # The network still hangs; the device does not.
            with each.scheduler.admit(1, each.runtimes[0]) as place:
                pixels = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
                assert (await place.predict(each.runtimes[0], pixels)).value.shape == (1, len(CLASS_IDS))
            await each.call(*range(10))
            await until(lambda: shadow.ended)
            assert "took too long" in shadow.ended
            assert shadow.num_dropped["slow"] + shadow.num_dropped["ended"] == 11
        finally:
            opened.set()


async def test_images_are_decoded_again_for_a_candidate_that_takes_others() -> None:
    async with house(size=8) as each:
        shadow = await each.start()
        await each.call(0, 1)
        await until(lambda: shadow.num_recorded == 2)
        assert sum(each.runtimes[0].batches) == sum(each.runtimes[1].batches) == 2


async def test_an_alias_that_moves_ends_it() -> None:
    async with house() as each:
        shadow = await each.start()
        each.models.aliases["m@production"] = "m:2"
        await each.call(1)
        assert shadow.ended == "m@production is m:2 now, and was m:1"
        assert shadow.num_seen == 0
        # An ended one makes way, and can be read until then.
        assert each.shadows.all() == (shadow,)
        after = await each.start(candidate="m:1")
        assert each.shadows.all() == (after,)


@pytest.mark.parametrize("event", ["dropped", "unloaded", "alias_deleted"])
async def test_a_model_that_goes_ends_it_and_is_let_go_of(event: str) -> None:
    async with house() as each:
        shadow = await each.start()
        if event == "dropped":
            del each.models.memory["m:2"]
        elif event == "unloaded":
            each.models.memory.clear()
            each.models.unloaded.add("m")
        else:
            del each.models.aliases["m@production"]
        gc.collect()
        assert (shadow.candidate() is None) == (event != "alias_deleted"), "it holds no model"
        each.shadows.check()
        said = {"dropped": "no longer in memory", "unloaded": "was unloaded", "alias_deleted": "m@production is gone"}
        assert said[event] in shadow.ended


async def test_there_are_not_too_many_and_one_of_each() -> None:
    async with house() as each:
        for number in range(MAX_SHADOWS):
            each.models.aliases[f"m@a{number}"] = "m:1"
            await each.start(alias=f"a{number}")
        with pytest.raises(LimitExceeded, match="8 shadows are the limit"):
            await each.start()
        with pytest.raises(Conflict, match="m@a1 has a shadow, m:2: stop it first"):
            await each.start(alias="a1")
        assert each.shadows.stop("m", "a1").ended == "it was stopped"
        await each.start()
        with pytest.raises(ModelNotFound, match="m@a1 has no shadow"):
            each.shadows.stop("m", "a1")


async def test_models_that_can_not_be_compared_are_refused() -> None:
    async with house(classes=("x", "y")) as each:
        with pytest.raises(InvalidRequest, match="no class in common") as caught:
            await each.start()
        assert caught.value.field == "candidate"
        assert each.shadows.all() == ()


async def test_prometheus_is_told() -> None:
    async with house() as each:
        shadow = await each.start()
        await each.call(1, 2)
        await until(lambda: shadow.num_recorded == 2)
        shadow.drop(3, "full")
        nothing = cast(Any, SimpleNamespace(loaded=tuple))
        metrics = ServerMetrics(nothing, Devices([each.scheduler]), CallCounts(), LoadCounts(), tuple, each.shadows.all)
        text = generate_latest(make_registry(metrics)).decode()
    labels = 'alias="production",candidate="m:2",model="m"'
    assert f"tandem_inference_shadow_images_total{{{labels}}} 2.0" in text
    assert f"tandem_inference_shadow_seen_images_total{{{labels}}} 2.0" in text
    assert f'tandem_inference_shadow_dropped_images_total{{{labels},reason="full"}} 3.0' in text
