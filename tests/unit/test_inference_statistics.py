"""What the scheduler counts of each model: calls by how they ended, and batches."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from services.inference.admission import Limits
from services.inference.health import HealthBoard
from services.inference.scheduler import DeviceScheduler
from tandem.errors import DeadlineExceeded, InvalidRequest, QueueFull

PIXELS = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)


class Doubling:
    """A runtime whose logits are two for each pixel's value."""

    def predict(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float()[:, :2] * 2


@pytest.fixture
def scheduler() -> Iterator[DeviceScheduler]:
    scheduler = DeviceScheduler(torch.device("cpu"), limits=Limits(items=4, model_items=4))
    yield scheduler
    scheduler.close()


async def test_a_call_that_succeeds(scheduler: DeviceScheduler) -> None:
    runtime = Doubling()
    with scheduler.admit(3, runtime) as place:
        await asyncio.sleep(0.01)
        await place.predict(runtime, PIXELS)
        await place.rank(runtime, PIXELS, 1)
        await asyncio.sleep(0.02)
    told = scheduler.statistics(runtime)
    assert (told.success.count, told.fail.count, told.cancel.count, told.num_items, told.num_batches) == (1, 0, 0, 3, 2)
    assert told.batches[3].count == 2
    assert told.compute_input.ns >= 10_000_000
    assert told.compute_output.ns >= 20_000_000
    parts = (told.queue, told.compute_input, told.compute_infer, told.compute_output)
    assert sum(each.ns for each in parts) == pytest.approx(told.success.ns, rel=0.01)
    # What is handed out is a copy.
    told.success.add(1.0)
    assert scheduler.statistics(runtime).success.count == 1
    scheduler.begin_statistics(runtime)
    assert scheduler.statistics(runtime).success.count == scheduler.statistics(runtime).num_batches == 0


async def test_calls_that_do_not(scheduler: DeviceScheduler) -> None:
    runtime, other = Doubling(), Doubling()
    with pytest.raises(InvalidRequest), scheduler.admit(1, runtime):
        raise InvalidRequest("the image does not decode")
    with scheduler.admit(4, runtime), pytest.raises(QueueFull), scheduler.admit(1, runtime):
        pass
    opened = threading.Event()
    holding = asyncio.create_task(scheduler.run(lambda: opened.wait(60)))
    try:
        with pytest.raises(DeadlineExceeded), scheduler.admit(1, runtime, deadline=0.0) as place:
            await asyncio.gather(place.predict(runtime, PIXELS[:1]), asyncio.to_thread(opened.set))
    finally:
        opened.set()
        await holding
    with pytest.raises(asyncio.CancelledError), scheduler.admit(1, runtime):
        raise asyncio.CancelledError
    told = scheduler.statistics(runtime)
    assert (told.success.count, told.fail.count, told.cancel.count, told.num_items) == (1, 3, 1, 4)
    assert (told.num_batches, told.last_success_at > 0) == (0, True)
    assert scheduler.statistics(other).fail.count == 0


async def test_the_server_is_ready_from_its_start_to_its_stop() -> None:
    board = HealthBoard()
    await board.starting()
    said = [board.is_ready]
    await board.ready()
    said.append(board.is_ready)
    await board.stopping()
    said.append(board.is_ready)
    # A look at the volume that ends now changes nothing.
    await board.ready()
    assert [*said, board.is_ready] == [False, True, False, False]
