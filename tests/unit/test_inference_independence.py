"""Guarantee 5 with shared batches: the same image gives the same bytes, whoever it meets."""

import asyncio
import random
from collections.abc import Iterator

import pytest
import torch
from random_networks import images, runtime_of

from services.inference.independence import rows_are_independent
from services.inference.scheduler import DeviceScheduler

CPU = torch.device("cpu")


@pytest.fixture
def scheduler() -> Iterator[DeviceScheduler]:
    scheduler = DeviceScheduler(CPU)
    yield scheduler
    scheduler.close()


class Leaky:
    """A runtime whose answers depend, by one bit or so, on the size of the batch or on the place in it."""

    def __init__(self, on_size: bool = False, on_place: bool = False) -> None:
        self._on_size, self._on_place = on_size, on_place

    def predict(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = pixels.flatten(1).double().mean(1, keepdim=True)
        size = pixels.shape[0] * self._on_size
        place = torch.arange(pixels.shape[0]).unsqueeze(1) * self._on_place
        return logits + 1e-9 * (size + place)


async def test_a_network_is_tried_before_its_images_share_batches(scheduler: DeviceScheduler) -> None:
    assert await rows_are_independent(scheduler, Leaky(), 8)
    assert not await rows_are_independent(scheduler, Leaky(on_size=True), 8)
    assert not await rows_are_independent(scheduler, Leaky(on_place=True), 8)
    assert await rows_are_independent(scheduler, runtime_of("resnet18"), 32)
    # Known to keep a rest, see runtimes.eager.
    assert not await rows_are_independent(scheduler, runtime_of("efficientnet_b0"), 32)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small"])
async def test_whoever_an_image_meets_its_bytes_are_the_same(scheduler: DeviceScheduler, arch: str) -> None:
    runtime, pixels, chance = runtime_of(arch), images(24), random.Random(4)
    # On the scheduler's thread, which has its own number of torch's threads.
    alone = torch.cat([(await scheduler.predict(runtime, pixels[place : place + 1])).value for place in range(24)])
    met: list[int] = []
    runtime._network.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0].shape[0]))

    async def ask() -> None:
        places = chance.choices(range(24), k=chance.choice((1, 1, 1, 1, 1, 1, 2, 5, 40)))
        task = asyncio.create_task(scheduler.predict(runtime, pixels[places], joins=True))
        if chance.random() < 0.2:
            task.cancel()
        (answer,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(answer, asyncio.CancelledError):
            assert not isinstance(answer, BaseException)
            assert torch.equal(answer.value, alone[places])

    # In crowds of many sizes, so that how they meet hangs little on the machine's speed.
    for crowd in (1, 2, 3, 4, 5, 8, 13, 21, 34):
        await asyncio.gather(*(ask() for _ in range(crowd)))
    assert len(set(met)) > 3, "the calls were to meet in batches of many sizes"
