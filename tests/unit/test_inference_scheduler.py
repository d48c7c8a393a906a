import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from services.inference.scheduler import MAX_BATCH, DeviceScheduler
from tandem.errors import DeadlineExceeded, QueueFull, Unavailable


@pytest.fixture
def scheduler() -> Iterator[DeviceScheduler]:
    scheduler = DeviceScheduler(torch.device("cpu"), max_items=10)
    yield scheduler
    scheduler.close()


class Gate:
    """Work that holds the device until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.opened.wait(10)
        return "opened"


class Doubler:
    """A runtime that remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def predict(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(pixels.shape[0])
        return pixels * 2


async def test_work_runs_on_one_thread_in_turn(scheduler: DeviceScheduler) -> None:
    async def who() -> str:
        return (await scheduler.run(lambda: threading.current_thread().name)).value

    assert set(await asyncio.gather(*(who() for _ in range(20)))) == {"device-cpu"}


async def test_times_are_told(scheduler: DeviceScheduler) -> None:
    slow = asyncio.create_task(scheduler.run(lambda: time.sleep(0.05)))
    await asyncio.sleep(0)
    quick = await scheduler.run(lambda: 1)
    assert quick.queue_ms > 30
    assert quick.compute_ms < 30
    assert (await slow).compute_ms >= 49


async def test_large_requests_are_cut_and_others_come_between(scheduler: DeviceScheduler) -> None:
    runtime = Doubler()
    pixels = torch.arange(2 * MAX_BATCH + 3).reshape(-1, 1)
    order: list[str] = []

    async def large() -> torch.Tensor:
        done = await scheduler.predict(runtime, pixels)
        order.append("large")
        return done.value

    async def small() -> None:
        await scheduler.run(lambda: None)
        order.append("small")

    logits, _ = await asyncio.gather(large(), small())
    assert torch.equal(logits, pixels * 2)
    assert runtime.sizes == [MAX_BATCH, MAX_BATCH, 3]
    assert order == ["small", "large"]


async def test_errors_go_to_who_asked(scheduler: DeviceScheduler) -> None:
    async def fails() -> None:
        with pytest.raises(ZeroDivisionError):
            await scheduler.run(lambda: 1 / 0)

    await fails()
    assert (await scheduler.run(lambda: 7)).value == 7


async def test_a_passed_deadline_is_found_at_dequeue(scheduler: DeviceScheduler) -> None:
    gate, ran = Gate(), []
    first = asyncio.create_task(scheduler.run(gate))
    late = asyncio.create_task(scheduler.run(lambda: ran.append(1), deadline=time.monotonic() + 0.02))
    await asyncio.sleep(0.05)
    gate.opened.set()
    with pytest.raises(DeadlineExceeded):
        await late
    assert (await first).value == "opened"
    assert ran == []


async def test_abandoned_work_is_dropped(scheduler: DeviceScheduler) -> None:
    gate, ran = Gate(), []
    first = asyncio.create_task(scheduler.run(gate))
    storm = [asyncio.create_task(scheduler.run(lambda: ran.append(1))) for _ in range(200)]
    await asyncio.sleep(0.01)
    for task in storm:
        task.cancel()
    await asyncio.gather(*storm, return_exceptions=True)
    gate.opened.set()
    assert (await first).value == "opened"
    assert (await scheduler.run(lambda: 1)).value == 1
    assert ran == []


async def test_a_caller_may_leave_while_its_work_runs(scheduler: DeviceScheduler) -> None:
    gate = Gate()
    task = asyncio.create_task(scheduler.run(gate))
    assert await asyncio.to_thread(gate.entered.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.opened.set()
    assert (await scheduler.run(lambda: 1)).value == 1


async def test_the_queue_is_bounded_by_items(scheduler: DeviceScheduler) -> None:
    with scheduler.admit(8):
        with pytest.raises(QueueFull, match="8 of 10 items") as caught, scheduler.admit(3):
            pass
        assert caught.value.retry_after_s > 0
        with scheduler.admit(2):
            assert scheduler.num_items == 10
    assert scheduler.num_items == 0
    with scheduler.admit(1000):
        assert scheduler.num_items == 1000


async def test_closing_ends_what_runs_and_fails_what_waits() -> None:
    scheduler, gate, ran = DeviceScheduler(torch.device("cpu")), Gate(), []
    first = asyncio.create_task(scheduler.run(gate))
    waiting = [asyncio.create_task(scheduler.run(lambda: ran.append(1))) for _ in range(2)]
    assert await asyncio.to_thread(gate.entered.wait, 5)
    closing = asyncio.create_task(asyncio.to_thread(scheduler.close))
    while not scheduler._closed:
        await asyncio.sleep(0.01)
    gate.opened.set()
    await closing
    assert (await first).value == "opened"
    for each in waiting:
        with pytest.raises(Unavailable, match="stopping"):
            await asyncio.wait_for(each, 1)
    with pytest.raises(Unavailable, match="stopping"):
        await asyncio.wait_for(scheduler.run(lambda: ran.append(1)), 1)
    assert ran == []
