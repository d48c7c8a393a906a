"""Texts of several callers on one device's thread: they share steps, leave, fail and end without harm to each other."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest
import torch
from text_models import WORDS, Model

from services.inference.scheduler import DeviceScheduler
from services.inference.texts import TextLoop
from tandem.errors import CheckpointCorrupt, DeadlineExceeded, Unavailable
from tandem.models.decoding import Text
from tandem.models.sampling import Sampling
from tandem.wire.limits import MAX_UNREAD_WORDS


@pytest.fixture
async def scheduler() -> AsyncIterator[DeviceScheduler]:
    scheduler = DeviceScheduler(torch.device("cpu"))
    yield scheduler
    scheduler.close()


async def write(
    loop: TextLoop,
    scheduler: DeviceScheduler,
    max_words: int,
    num_prompt: int = 0,
    deadline: float | None = None,
    seen: Callable[[int], None] = lambda _: None,
) -> list[str]:
    words: list[str] = []
    text = Text(WORDS, Sampling(temperature=0.0))
    read = text.begin((3,) * num_prompt)
    with scheduler.admit(1, loop._runtime, deadline=deadline, stream=True) as place:
        async with aclosing(loop.write([text], read, max_words, place)) as steps:
            async for news in steps:
                words += [drawn.word for drawn in news.drawn]
                seen(len(words))
    return words


async def test_callers_share_steps(scheduler: DeviceScheduler) -> None:
    model = Model()
    loop = TextLoop(model, scheduler)
    alone = await write(loop, scheduler, 200)
    texts = await asyncio.gather(*(write(loop, scheduler, 200) for _ in range(3)))
    assert texts == [alone] * 3
    assert model.slots.largest == 3
    assert model.slots.num_texts == 0


async def test_a_caller_that_leaves_frees_its_row(scheduler: DeviceScheduler) -> None:
    model = Model(capacity=1)
    loop = TextLoop(model, scheduler)
    begun = asyncio.Event()
    leaver = asyncio.create_task(write(loop, scheduler, 100_000, seen=lambda _: begun.set()))
    await begun.wait()
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    assert len(await write(loop, scheduler, 5)) == 5
    assert scheduler.num_items == 0


async def test_a_caller_that_stops_reading_is_waited_for_without_work(scheduler: DeviceScheduler) -> None:
    model = Model()
    loop = TextLoop(model, scheduler)
    text = Text(WORDS, Sampling(temperature=0.0))
    with scheduler.admit(1, model, stream=True) as place:
        async with aclosing(loop.write([text], text.begin(()), 3 * MAX_UNREAD_WORDS, place)) as steps:
            words = len((await anext(steps)).drawn)
            # Others are served while it does not read.
            for _ in range(3):
                assert len(await write(loop, scheduler, 100)) == 100
            while text.num_words < MAX_UNREAD_WORDS:
                await asyncio.sleep(0.01)
            assert (text.num_words, model.slots.num_texts) == (MAX_UNREAD_WORDS, 0)
            async for news in steps:
                words += len(news.drawn)
    assert words == 3 * MAX_UNREAD_WORDS


async def test_a_step_that_fails_fails_those_in_it_and_the_next_begin_anew(scheduler: DeviceScheduler) -> None:
    model = Model()
    loop = TextLoop(model, scheduler)
    model.fails_with = RuntimeError("out of memory")
    results = await asyncio.gather(*(write(loop, scheduler, 50) for _ in range(2)), return_exceptions=True)
    assert [str(each) for each in results] == ["out of memory"] * 2
    model.fails_with = None
    assert len(await write(loop, scheduler, 50)) == 50


async def test_answers_that_are_no_numbers_fail_their_text_alone(scheduler: DeviceScheduler) -> None:
    model = Model()
    loop = TextLoop(model, scheduler)
    model.slots.broken_at = 3
    broken, well = await asyncio.gather(
        write(loop, scheduler, 5, num_prompt=1), write(loop, scheduler, 1), return_exceptions=True
    )
    assert isinstance(broken, CheckpointCorrupt)
    assert isinstance(well, list)


async def test_the_deadline_ends_a_text_that_waits(scheduler: DeviceScheduler) -> None:
    model = Model(capacity=1)
    loop = TextLoop(model, scheduler)
    model.gate = threading.Event()
    first = asyncio.create_task(write(loop, scheduler, 100_000))
    while not model.at_gate.is_set():
        await asyncio.sleep(0.001)
    late = asyncio.create_task(write(loop, scheduler, 5, deadline=time.monotonic() + 0.01))
    await asyncio.sleep(0.05)
    model.gate.set()
    with pytest.raises(DeadlineExceeded, match="after 0 words"):
        await late
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_server_that_stops_ends_texts_with_unavailable(scheduler: DeviceScheduler) -> None:
    loop = TextLoop(Model(), scheduler)
    begun = asyncio.Event()
    text = asyncio.create_task(write(loop, scheduler, 100_000, seen=lambda _: begun.set()))
    await begun.wait()
    await asyncio.to_thread(scheduler.close)
    with pytest.raises(Unavailable):
        await text


async def test_other_work_waits_for_one_step_and_not_for_a_turn(scheduler: DeviceScheduler) -> None:
    model = Model()
    loop = TextLoop(model, scheduler)
    begun = asyncio.Event()
    text = asyncio.create_task(write(loop, scheduler, 100_000, seen=lambda _: begun.set()))
    await begun.wait()
    # A step that other work is put in the queue during: the turn ends with it.
    model.gate = threading.Event()
    while not model.at_gate.is_set():
        await asyncio.sleep(0.001)
    before = model.num_steps
    other = asyncio.create_task(scheduler.run(lambda: model.num_steps))
    while not scheduler.num_waiting:
        await asyncio.sleep(0.001)
    model.gate.set()
    assert (await other).value == before
    text.cancel()
    with pytest.raises(asyncio.CancelledError):
        await text
