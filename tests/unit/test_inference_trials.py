"""What a load tries out: on the device's thread, after what callers wait for, and never for ever."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
from waiting import until

from services.inference.runtimes.interface import ClassifierRuntime
from services.inference.runtimes.selection import RuntimeSelector
from services.inference.scheduler import DeviceScheduler
from services.inference.trials import run_in_turn
from tandem.checkpoints.card import Preprocessing
from tandem.errors import Unavailable

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(resize=16, image_size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture
def scheduler() -> Iterator[DeviceScheduler]:
    scheduler = DeviceScheduler(CPU)
    yield scheduler
    scheduler.close()


async def test_it_comes_after_what_callers_wait_for(scheduler: DeviceScheduler) -> None:
    order: list[str] = []
    opened, busy = threading.Event(), threading.Event()

    def occupy() -> None:
        busy.set()
        opened.wait()

    occupied = asyncio.create_task(scheduler.run(occupy))
    await until(busy.is_set)
    loop = asyncio.get_running_loop()
    trial = asyncio.create_task(asyncio.to_thread(run_in_turn, scheduler, loop, lambda: order.append("trial")))
    await until(lambda: scheduler.is_wanted)
    called = asyncio.create_task(scheduler.run(lambda: order.append("call")))
    await asyncio.sleep(0)
    opened.set()
    await asyncio.gather(occupied, trial, called)
    assert order == ["call", "trial"]


async def test_it_returns_and_raises_what_the_work_does(scheduler: DeviceScheduler) -> None:
    loop = asyncio.get_running_loop()
    here = threading.current_thread()
    assert await asyncio.to_thread(run_in_turn, scheduler, loop, threading.current_thread) not in (here, None)
    for error in (ZeroDivisionError, TimeoutError):

        def fail(error: type[Exception] = error) -> None:
            raise error("a bug")

        with pytest.raises(error, match="a bug"):
            await asyncio.to_thread(run_in_turn, scheduler, loop, fail)


async def test_a_server_that_stops_leaves_nobody_waiting(scheduler: DeviceScheduler) -> None:
    opened = threading.Event()
    asyncio.get_running_loop().call_later(0.05, opened.set)
    occupied = asyncio.create_task(scheduler.run(opened.wait))
    trial = asyncio.create_task(asyncio.to_thread(run_in_turn, scheduler, asyncio.get_running_loop(), lambda: None))
    await until(lambda: scheduler.is_wanted)
    await asyncio.to_thread(scheduler.close)
    with pytest.raises(Unavailable):
        await trial
    await asyncio.gather(occupied, return_exceptions=True)
    # Its device is gone: whoever comes now computes by himself.
    assert await asyncio.to_thread(run_in_turn, scheduler, asyncio.get_running_loop(), lambda: 7) == 7


def test_a_loop_that_ended_is_not_waited_for(scheduler: DeviceScheduler) -> None:
    loop = asyncio.new_event_loop()
    outcomes: list[object] = []

    def ask() -> None:
        try:
            run_in_turn(scheduler, loop, lambda: None)
        except Unavailable as error:
            outcomes.append(error)

    # A loop that is there and runs nothing any more, and then is closed.
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    loop.close()
    thread.join(240)
    ask()
    assert len(outcomes) == 2


def test_all_that_a_selection_runs_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 64, 3), torch.nn.AvgPool2d(7), torch.nn.Flatten(), torch.nn.Linear(256, 5))
    network = torch.nn.Sequential(*layers).eval().requires_grad_(False)
    predicted: list[bool] = []
    in_turn = threading.local()

    def turns(work: object) -> object:
        in_turn.now = True
        try:
            return work()  # type: ignore[operator]
        finally:
            in_turn.now = False

    def watched(runtime: ClassifierRuntime) -> None:
        predict = runtime.predict

        def noted(pixels: torch.Tensor) -> torch.Tensor:
            predicted.append(getattr(in_turn, "now", False))
            return predict(pixels)

        runtime.predict = noted  # type: ignore[method-assign]

    selector = RuntimeSelector(CPU)
    build = selector._build

    def built(*arguments: object) -> ClassifierRuntime:
        runtime = build(*arguments)  # type: ignore[arg-type]
        watched(runtime)
        return runtime

    monkeypatch.setattr(selector, "_build", built)
    selected = selector.select(network, PREPROCESSING, turns)
    assert len(predicted) > 17
    assert all(predicted)
    assert selected.keeps_rows == (selected.runtime.name == "openvino")
