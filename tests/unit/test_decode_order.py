"""Whose images are decoded next: by priority, in turns, and nothing of those who have left."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import torch
from factories import png
from waiting import PATIENCE_S, until

from services.inference.decode_order import CallInOrder, DecodeOrder
from services.inference.decode_threads import DecodeThreads, Group
from services.inference.decoding import Decoder
from services.inference.lanes import PROMOTE_AFTER_S, Priority
from tandem.checkpoints.card import Preprocessing

HIGH, NORMAL, LOW = Priority
PREPROCESSING = Preprocessing(resize=32, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def call(name: str, num_groups: int, priority: Priority = NORMAL) -> CallInOrder[str]:
    return CallInOrder(priority, [f"{name}{number}" for number in range(num_groups)])


def taken(order: DecodeOrder[str], now: float = 1.0) -> list[str]:
    """Return all that waits, in the order in which it is taken."""
    groups = []
    while (turn := order.take(now)) is not None:
        groups.append(turn[1])
    return groups


def test_the_urgent_go_first_and_equals_take_turns() -> None:
    order = DecodeOrder[str]()
    for each in (call("l", 2, LOW), call("a", 3), call("b", 1), call("c", 2), call("h", 2, HIGH)):
        order.add(each, 0.0)
    assert taken(order) == ["h0", "h1", "a0", "b0", "c0", "a1", "c1", "a2", "l0", "l1"]
    assert order.take(1.0) is None


def test_one_that_comes_later_goes_before_the_second_turn_of_its_equals_and_the_rest_of_the_less_urgent() -> None:
    order = DecodeOrder[str]()
    order.add(call("a", 4), 0.0)
    assert order.take(0.1) is not None
    order.add(call("b", 1), 0.2)
    order.add(call("h", 1, HIGH), 0.3)
    assert taken(order) == ["h0", "a1", "b0", "a2", "a3"]


def test_one_that_had_no_turn_for_long_counts_as_more_urgent_until_it_has_one() -> None:
    order = DecodeOrder[str]()
    order.add(call("l", 3, LOW), 0.0)
    order.add(call("h", 20, HIGH), 0.0)
    now, had = 0.0, list[tuple[float, str]]()
    while (turn := order.take(now)) is not None and len(had) < 13:
        had.append((now, turn[1]))
        now += PROMOTE_AFTER_S / 2
    # Two priorities higher after as many times PROMOTE_AFTER_S, and then first of its equals once.
    turns = [(at / PROMOTE_AFTER_S, group) for at, group in had if group[0] == "l"]
    assert turns == [(2.0, "l0"), (4.0, "l1"), (6.0, "l2")]


def test_what_is_put_back_goes_first_of_its_call_when_that_has_its_turn() -> None:
    order, a, b = DecodeOrder[str](), call("a", 1), call("b", 2)
    order.add(a, 0.0)
    order.add(b, 0.0)
    assert order.take(0.1) == (a, "a0")
    assert order.put_back(a, "a0", 0.2)
    assert order.take(0.3) == (b, "b0")
    assert order.put_back(b, "b0", 0.4)
    assert taken(order) == ["a0", "b0", "b1"]


def test_nothing_is_left_of_one_that_is_dropped() -> None:
    order, a, b = DecodeOrder[str](), call("a", 3), call("b", 1)
    order.add(a, 0.0)
    order.add(b, 0.0)
    assert order.take(0.1) == (a, "a0")
    assert order.drop(a) == ["a1", "a2"]
    assert order.drop(a) == []
    assert not order.put_back(a, "a0", 0.2)
    assert order.drain() == ["b0"]
    assert taken(order) == []


def test_a_group_goes_on_where_it_was() -> None:
    group, turns = Group(lambda number: 2 * number, range(5)), 1
    while not group.go_on(turn_s=0):
        turns += 1
    assert (turns, group.future.result()) == (5, [0, 2, 4, 6, 8])


class Gate:
    """Work that waits until it is opened, and tells what it was done for."""

    def __init__(self) -> None:
        self.begun, self._opened = list[str](), threading.Event()

    def __call__(self, name: str) -> str:
        self.begun.append(name)
        assert self._opened.wait(PATIENCE_S)
        return name.upper()

    def open(self) -> None:
        self._opened.set()


@asynccontextmanager
async def one_thread() -> AsyncIterator[tuple[DecodeThreads, Gate]]:
    threads, gate = DecodeThreads(1), Gate()
    try:
        yield threads, gate
    finally:
        gate.open()
        threads.close()


def starting(
    threads: DecodeThreads, work: Callable[[str], str], names: str, priority: Priority = NORMAL
) -> "asyncio.Task[list[str]]":
    return asyncio.create_task(threads.do(work, names, 1, priority))


async def test_an_urgent_call_waits_for_what_has_begun_alone() -> None:
    async with one_thread() as (threads, gate):
        low = starting(threads, gate, "abcdef", LOW)
        await until(lambda: gate.begun == ["a"])
        high = starting(threads, gate, "xy", HIGH)
        # It comes to the threads before it waits for anything.
        await asyncio.sleep(0)
        gate.open()
        assert await high == ["X", "Y"]
        assert await low == list("ABCDEF")
        assert gate.begun == list("axybcdef")


async def test_what_has_not_begun_of_a_call_that_leaves_never_does() -> None:
    async with one_thread() as (threads, gate):
        left = starting(threads, gate, "abcdef")
        await until(lambda: gate.begun == ["a"])
        stays = starting(threads, gate, "xy", LOW)
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        gate.open()
        assert await stays == ["X", "Y"]
        assert gate.begun == list("axy")


async def test_a_failure_is_told_and_ends_what_waits_of_its_call() -> None:
    async with one_thread() as (threads, gate):

        def fails_first(name: str) -> str:
            gate(name)
            raise ValueError(name)

        failing = starting(threads, fails_first, "abc")
        await until(lambda: gate.begun == ["a"])
        gate.open()
        with pytest.raises(ValueError, match="a"):
            await failing
        assert await threads.do(gate, "x", 1, LOW) == ["X"]
        # At the most one was taken before the loop heard of the failure.
        assert "c" not in gate.begun or gate.begun.index("c") < gate.begun.index("x")


async def test_those_who_wait_when_the_threads_end_are_told() -> None:
    async with one_thread() as (threads, gate):
        under_way, waiting = starting(threads, gate, "a"), starting(threads, gate, "b")
        await until(lambda: gate.begun == ["a"])
        threads.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.open()
        assert await under_way == ["A"]
        assert await asyncio.wait_for(threads.do(gate, "", 1, NORMAL), PATIENCE_S) == []
        with pytest.raises(RuntimeError):
            await threads.do(gate, "c", 1, NORMAL)


async def test_work_that_takes_long_lets_others_in_between_its_items() -> None:
    threads, gate = DecodeThreads(1, turn_s=0), Gate()
    try:
        low = asyncio.create_task(threads.do(gate, "abcdef", 8, LOW))
        await until(lambda: gate.begun == ["a"])
        high = asyncio.create_task(threads.do(gate, "xyz", 8, HIGH))
        await asyncio.sleep(0)
        gate.open()
        assert await high == ["X", "Y", "Z"]
        assert await low == list("ABCDEF")
        assert gate.begun == list("axyzbcdef")
    finally:
        gate.open()
        threads.close()


async def test_an_urgent_image_waits_for_a_group_of_a_large_message_at_the_most() -> None:
    decoder, gate, images = Decoder(1), Gate(), [png(number) for number in range(40)]

    def reading(name: str, image: bytes) -> Callable[[], bytes]:
        def read() -> bytes:
            gate(name)
            return image

        return read

    try:
        sources = [reading(f"low {number}", image) for number, image in enumerate(images)]
        low = asyncio.create_task(decoder.decode(sources, [PREPROCESSING], priority=LOW))
        await until(lambda: gate.begun == ["low 0"])
        high = asyncio.create_task(decoder.decode([reading("high", images[7])], [PREPROCESSING], priority=HIGH))
        await asyncio.sleep(0)
        gate.open()
        batch, alone = await low, await high
        assert gate.begun.index("high") <= 8
        assert sorted(gate.begun) == sorted([f"low {number}" for number in range(40)] + ["high"])
        assert batch.indices == tuple(range(40))
        assert torch.equal(batch.pixels[0][7], alone.pixels[0][0])
    finally:
        gate.open()
        decoder.close()
