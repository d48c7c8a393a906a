import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from waiting import until

from services.inference.niceness import NICENESS
from services.inference.scheduler import MAX_BATCH, DeviceScheduler, Priority
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
        assert self.opened.wait(60)
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
    assert await asyncio.to_thread(gate.entered.wait, 60)
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
    assert await asyncio.to_thread(gate.entered.wait, 60)
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


class Slow(Doubler):
    """A runtime that takes a little for each batch and each image, and fails where it is told to."""

    def __init__(self, fails: bool = False, times: int = 1) -> None:
        super().__init__()
        self.fails, self.times = fails, times

    def predict(self, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(self.times * (0.004 + 0.001 * pixels.shape[0]))
        if self.fails:
            raise ZeroDivisionError
        return super().predict(pixels)


def image(number: int) -> torch.Tensor:
    return torch.tensor([[number]])


async def held(scheduler: DeviceScheduler) -> tuple[Gate, "asyncio.Task[object]"]:
    """Hold the device; open the gate and await the task to let it go on."""
    gate = Gate()
    holding = asyncio.create_task(scheduler.run(gate))
    assert await asyncio.to_thread(gate.entered.wait, 60)
    return gate, holding


async def test_calls_share_batches_and_each_gets_its_own_rows(scheduler: DeviceScheduler) -> None:
    runtime = Doubler()
    gate, holding = await held(scheduler)
    calls = [
        asyncio.create_task(scheduler.predict(runtime, torch.arange(first, first + size).reshape(-1, 1), joins=True))
        for first, size in ((0, 1), (100, 30), (200, 3), (300, 40))
    ]
    apart = asyncio.create_task(scheduler.predict(runtime, image(7)))
    await asyncio.sleep(0.01)
    gate.opened.set()
    answers = [(await call).value.flatten().tolist() for call in calls]
    await holding
    assert answers == [
        [2 * (first + n) for n in range(size)] for first, size in ((0, 1), (100, 30), (200, 3), (300, 40))
    ]
    assert (await apart).value.tolist() == [[14]]
    assert sorted(runtime.sizes) == [1, 10, 32, 32]


async def test_images_of_other_shapes_never_meet(scheduler: DeviceScheduler) -> None:
    runtime = Doubler()
    gate, holding = await held(scheduler)
    shapes = ((1, 3), (2, 3), (1, 4))
    calls = [asyncio.create_task(scheduler.predict(runtime, torch.ones(shape), joins=True)) for shape in shapes]
    await asyncio.sleep(0.01)
    gate.opened.set()
    assert [tuple((await call).value.shape) for call in calls] == list(shapes)
    await holding


async def test_a_batch_that_fails_fails_its_calls_alone(scheduler: DeviceScheduler) -> None:
    broken, whole = Slow(fails=True), Slow()
    calls = [
        scheduler.predict(runtime, image(number), joins=True) for number, runtime in enumerate([broken, whole] * 5)
    ]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(answer, ZeroDivisionError) for answer in answers] == [True, False] * 5
    large = scheduler.predict(broken, torch.zeros(3 * MAX_BATCH, 1), joins=True)
    with pytest.raises(ZeroDivisionError):
        await large
    assert scheduler.num_waiting == 0


async def test_a_batch_that_memory_lacks_for_may_be_tried_again_smaller(scheduler: DeviceScheduler) -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB\nwith a second line")

    with pytest.raises(QueueFull, match="the device has no memory for this batch now; send fewer images at a time"):
        await scheduler.run(too_large)
    assert (await scheduler.run(lambda: 7)).value == 7


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_device_whose_context_is_lost_takes_no_more_calls(scheduler: DeviceScheduler) -> None:
    def illegal() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises((torch.AcceleratorError, Unavailable)):
        await scheduler.run(illegal)
    await until(lambda: not scheduler.is_alive)
    with pytest.raises(Unavailable):
        await scheduler.run(lambda: 7)


async def test_a_thousand_cancelled_calls_leave_it_empty_and_serving(scheduler: DeviceScheduler) -> None:
    runtime, sizes = Slow(), [1, 2, 40]
    storm = [
        asyncio.create_task(scheduler.predict(runtime, torch.zeros(sizes[number % 3], 1), joins=number % 5 > 0))
        for number in range(1000)
    ]
    for number, task in enumerate(storm):
        if number % 50 == 0:
            await asyncio.sleep(0.001)
        task.cancel()
    answers = await asyncio.gather(*storm, return_exceptions=True)
    num_answered = sum(not isinstance(answer, BaseException) for answer in answers)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers if isinstance(answer, BaseException))
    assert scheduler.num_waiting == 0
    assert (await scheduler.predict(runtime, image(4), joins=True)).value.tolist() == [[8]]
    # What was cancelled before its turn was never computed: of some 14,000 images, a few batches at the most.
    assert sum(runtime.sizes) < 3000
    assert num_answered < 500


async def test_what_cannot_be_in_time_is_refused_at_once(scheduler: DeviceScheduler) -> None:
    runtime = Slow(times=10)
    for size in (1, 8, 32, 4, 16):
        await scheduler.predict(runtime, torch.zeros(size, 1))
    with (
        pytest.raises(
            DeadlineExceeded, match=r"about [\d.]+ ms, and the deadline is in 1\d\d ms: give the call more time"
        ),
        scheduler.admit(32, runtime, deadline=time.monotonic() + 0.19),
    ):
        pass
    assert scheduler.num_items == 0
    with scheduler.admit(32, runtime, deadline=time.monotonic() + 10) as place:
        await place.predict(runtime, torch.zeros(32, 1))


async def test_a_full_queue_says_when_there_will_be_room(scheduler: DeviceScheduler) -> None:
    runtime = Slow()
    for size in (1, 8, 32, 4, 16):
        await scheduler.predict(runtime, torch.zeros(size, 1))
    gate, holding = await held(scheduler)
    with scheduler.admit(320, runtime) as place:
        waiting = asyncio.create_task(place.predict(runtime, torch.zeros(320, 1), joins=True))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as caught, scheduler.admit(10, runtime):
            pass
        gate.opened.set()
        await waiting
    await holding
    # Ten batches of 36 ms, and all of them must go, since one call fills the queue.
    assert 0.2 < caught.value.retry_after_s < 10


async def test_an_idle_device_does_not_wait_where_nothing_is_on_its_way() -> None:
    scheduler, runtime = DeviceScheduler(torch.device("cpu"), max_delay_s=30.0), Doubler()
    try:
        with scheduler.admit(1, runtime, joins=True) as place:
            await asyncio.wait_for(place.predict(runtime, image(1), joins=True), 120)
        with scheduler.admit(1, runtime, joins=True) as first, scheduler.admit(1, runtime, joins=True) as second:
            waiting = asyncio.create_task(first.predict(runtime, image(1), joins=True))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            both = await asyncio.wait_for(asyncio.gather(waiting, second.predict(runtime, image(2), joins=True)), 120)
        assert [each.value.item() for each in both] == [2, 4]
        with scheduler.admit(1, runtime, joins=True) as first:
            with scheduler.admit(1, runtime, joins=True):
                waiting = asyncio.create_task(first.predict(runtime, image(1), joins=True))
                await asyncio.sleep(0.01)
            # The other has left without an image (it could not be decoded).
            await asyncio.wait_for(waiting, 120)
    finally:
        scheduler.close()
    assert runtime.sizes == [1, 2, 1]


async def test_the_urgent_overtake(scheduler: DeviceScheduler) -> None:
    gate, holding = await held(scheduler)
    order: list[Priority] = []

    async def call(priority: Priority) -> None:
        await scheduler.run(lambda: order.append(priority), priority=priority)

    calls = [asyncio.create_task(call(priority)) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH)]
    await asyncio.sleep(0.01)
    gate.opened.set()
    await asyncio.gather(holding, *calls)
    assert order == [Priority.HIGH, Priority.NORMAL, Priority.LOW]


async def test_nothing_is_kept_of_a_runtime_that_is_gone(scheduler: DeviceScheduler) -> None:
    runtime = Doubler()
    with scheduler.admit(1, runtime) as place:
        await place.predict(runtime, image(1), joins=True)
    assert len(scheduler._lanes) == 1
    del runtime, place
    await scheduler.run(lambda: None)
    gc.collect()
    assert len(scheduler._lanes) == 0


async def test_the_best_classes_hang_on_no_neighbour_not_even_where_they_are_equal(scheduler: DeviceScheduler) -> None:
    class Certain:
        """A runtime that is sure of a class, so that all others have the same probability: 0."""

        def predict(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(pixels[:, 0].long(), 300).float() * 1000

    runtime, sizes = Certain(), ((5, 1), (2, 7), (300, 3), (999, 1), (5, 40))
    alone = []
    for number, (top_k, size) in enumerate(sizes):
        with scheduler.admit(size, runtime) as place:
            alone.append((await place.rank(runtime, torch.full((size, 1), number), top_k, joins=True)).value)
    gate, holding = await held(scheduler)
    places = [scheduler._enter(1, (runtime,), 0, None, Priority.NORMAL, False, False) for _ in sizes]
    together = [
        asyncio.create_task(place.rank(runtime, torch.full((size, 1), number), top_k, joins=True))
        for number, (place, (top_k, size)) in enumerate(zip(places, sizes, strict=True))
    ]
    await asyncio.sleep(0.01)
    gate.opened.set()
    await holding
    for task, by_itself, (top_k, size) in zip(together, alone, sizes, strict=True):
        answer = (await task).value
        assert answer.indices.shape == (size, min(top_k, 300))
        assert torch.equal(answer.indices, by_itself.indices)
        assert torch.equal(answer.probabilities, by_itself.probabilities)


class Halves(Doubler):
    """A runtime whose batches may run beside each other; those wait until `at_once` of them run."""

    beside_from, beside_sizes = 4, tuple(range(1, 17))

    def __init__(self, at_once: int = 1) -> None:
        super().__init__()
        self._barrier = threading.Barrier(at_once)
        self.threads: set[str] = set()

    def predict_beside(self, pixels: torch.Tensor) -> torch.Tensor:
        self.threads.add(threading.current_thread().name)
        self._barrier.wait(60)
        if bool((pixels < 0).any()):
            raise ValueError("bad pixels")
        return self.predict(pixels)

    def on_each_stream(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [self.predict(pixels)] * 2


@pytest.fixture
def pair() -> Iterator[DeviceScheduler]:
    scheduler = DeviceScheduler(torch.device("cpu"), num_workers=2)
    yield scheduler
    scheduler.close()


async def test_batches_run_beside_each_other_and_each_call_gets_its_rows_in_order(pair: DeviceScheduler) -> None:
    runtime = Halves(at_once=2)
    pixels = torch.arange(4 * MAX_BATCH).reshape(-1, 1)
    done = await pair.predict(runtime, pixels, joins=True)
    assert torch.equal(done.value, pixels * 2)
    assert runtime.threads == {"device-cpu", "device-cpu-1"}
    assert max(runtime.sizes) == MAX_BATCH // 2


async def test_what_needs_the_device_to_itself_waits_for_both_workers(pair: DeviceScheduler) -> None:
    # The third is this test.
    runtime, running = Halves(at_once=3), []
    call = asyncio.create_task(pair.predict(runtime, torch.ones(8, 1), joins=True))
    await until(lambda: len(pair._backlog.running) == 2)
    alone = asyncio.create_task(pair.run(lambda: running.extend(pair._backlog.running)))
    await asyncio.sleep(0.01)
    assert not running
    await asyncio.to_thread(runtime._barrier.wait, 60)
    await asyncio.gather(call, alone)
    assert [batch.alone for batch in running] == [True]


async def test_others_run_once_what_they_waited_behind_is_cancelled(pair: DeviceScheduler) -> None:
    gate = Gate()
    held = asyncio.create_task(pair.run(gate, beside=True))
    await until(gate.entered.is_set)
    alone = asyncio.create_task(pair.run(lambda: None))
    await until(lambda: pair.num_waiting == 1)
    behind = asyncio.create_task(pair.predict(Halves(), torch.ones(6, 1), joins=True))
    await until(lambda: pair.num_waiting == 7)
    await asyncio.sleep(0.02)
    assert not behind.done()
    alone.cancel()
    await asyncio.wait_for(behind, 30)
    gate.opened.set()
    await held


async def test_a_model_goes_though_both_workers_idle_after_a_late_call(pair: DeviceScheduler) -> None:
    async def is_late() -> "weakref.ref[Halves]":
        runtime, deadline = Halves(), time.monotonic() + 0.01
        with pytest.raises(DeadlineExceeded):
            await pair.predict(runtime, torch.ones(2, 1), deadline=deadline, joins=True)
        return weakref.ref(runtime)

    gate = Gate()
    held = asyncio.create_task(pair.run(gate))
    await until(gate.entered.is_set)
    late = asyncio.create_task(is_late())
    await asyncio.sleep(0.05)
    gate.opened.set()
    await held
    gone = await late

    def is_gone() -> bool:
        gc.collect()
        return gone() is None

    await until(is_gone)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has a niceness for each thread")
async def test_workers_of_a_cpu_let_the_event_loop_go_first(pair: DeviceScheduler) -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    done = await pair.run(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert done.value == NICENESS > own


async def test_one_worker_s_error_is_that_of_its_calls(pair: DeviceScheduler) -> None:
    runtime = Halves(at_once=2)
    good, bad = torch.ones(4, 1), -torch.ones(4, 1)
    answers = await asyncio.gather(
        pair.predict(runtime, good, joins=True), pair.predict(runtime, bad, joins=True), return_exceptions=True
    )
    assert isinstance(answers[1], ValueError)
    assert not isinstance(answers[0], BaseException)
    assert torch.equal(answers[0].value, good * 2)


async def test_work_that_runs_beside_others_takes_one_worker(pair: DeviceScheduler) -> None:
    gate = Gate()
    held = asyncio.create_task(pair.run(gate, beside=True))
    await until(gate.entered.is_set)
    pixels = torch.ones(6, 1)
    assert torch.equal((await pair.predict(Halves(), pixels, joins=True)).value, pixels * 2)
    gate.opened.set()
    assert (await held).value == "opened"


async def test_a_thousand_calls_on_two_workers_are_each_answered_once(pair: DeviceScheduler) -> None:
    runtime = Halves()

    async def one(number: int) -> None:
        pixels = torch.full((1 + number % 5, 1), float(number))
        assert torch.equal((await pair.predict(runtime, pixels, joins=True)).value, pixels * 2)

    await asyncio.gather(*(one(number) for number in range(1000)))
    assert pair.num_waiting == 0
    assert not pair._backlog.running
