"""Answers to a stream of requests: in order, several at a time and no more, and nothing left when it is closed."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.inference.oip.parameters import Parameters, quoted, to_parameter
from services.inference.oip.servicer import OpenInferenceServicer, weight_of
from services.inference.streams import Window, in_order
from tandem.errors import InvalidRequest, Unavailable
from tandem.wire.oip import grpc_service_pb2 as pb


async def numbers(count: int, error: Exception | None = None) -> AsyncGenerator[int, None]:
    for number in range(count):
        yield number
    if error is not None:
        raise error


class Worker:
    """Answers each number with itself, as often as it is told, the later ones sooner."""

    def __init__(self, num_answers: int = 1, error_at: int | None = None) -> None:
        self.under_way = self.most = self.given_up = 0
        self._num_answers, self._error_at = num_answers, error_at

    async def answers(self, number: int) -> AsyncGenerator[int, None]:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for _ in range(self._num_answers):
                await asyncio.sleep(0.02 / (number + 1))
                if number == self._error_at:
                    raise ValueError(number)
                yield number
        except (asyncio.CancelledError, GeneratorExit):
            self.given_up += 1
            raise
        finally:
            self.under_way -= 1


async def test_answers_keep_the_order_of_the_requests() -> None:
    worker = Worker(num_answers=6)
    found = [each async for each in in_order(numbers(20), worker.answers, Window(4))]
    assert found == [number for number in range(20) for _ in range(6)]
    # The last of those may not quite have ended.
    assert 4 <= worker.most <= 5
    assert (worker.under_way, worker.given_up) == (0, 0)


@pytest.mark.parametrize("in_requests", [True, False])
async def test_an_error_comes_after_what_was_before_it(in_requests: bool) -> None:
    worker = Worker(error_at=None if in_requests else 3)
    requests = numbers(3, ValueError(3)) if in_requests else numbers(50)
    found: list[int] = []

    async def read() -> None:
        async for each in in_order(requests, worker.answers):
            found.append(each)

    with pytest.raises(ValueError, match="3"):
        await read()
    assert found == [0, 1, 2]
    assert worker.under_way == 0


async def test_what_waited_for_something_that_was_given_up_is_told_so() -> None:
    async def answers(number: int) -> AsyncGenerator[int, None]:
        if number == 1:
            load = asyncio.ensure_future(asyncio.Event().wait())
            load.cancel()
            await load
        yield number

    found: list[int] = []

    async def read() -> None:
        async for each in in_order(numbers(9), answers):
            found.append(each)

    with pytest.raises(Unavailable, match="was given up; try again"):
        await asyncio.wait_for(read(), 120)
    assert found == [0]


async def test_closed_it_gives_up_what_is_under_way() -> None:
    worker = Worker(num_answers=1000)
    async with aclosing(in_order(numbers(10), worker.answers)) as answers:
        assert await anext(answers) == 0
    assert worker.under_way == 0
    assert worker.given_up == 10


async def test_an_unread_stream_goes_no_further() -> None:
    asked = []

    async def requests() -> AsyncGenerator[int, None]:
        for number in range(1000):
            asked.append(number)
            yield number

    async with aclosing(in_order(requests(), Worker(num_answers=1000).answers, Window(4))) as answers:
        await anext(answers)
        await asyncio.sleep(0.05)
        assert len(asked) == 4


@pytest.mark.parametrize(("weights", "num_asked"), [([3, 4, 9, 9], 2), ([9, 1], 1), ([0] * 9, 4)])
async def test_an_unread_stream_goes_no_further_than_its_requests_weigh(weights: list[int], num_asked: int) -> None:
    asked = []

    async def requests() -> AsyncGenerator[int, None]:
        for number, weight in enumerate(weights):
            asked.append(number)
            yield weight

    window = Window(max_requests=4, max_weight=7)
    async with aclosing(in_order(requests(), Worker(num_answers=1000).answers, window, weigh=int)) as answers:
        await anext(answers)
        await asyncio.sleep(0.05)
        assert len(asked) == num_asked


async def test_what_weighs_too_much_alone_is_answered_alone() -> None:
    worker = Worker()
    found = [each async for each in in_order(numbers(9), worker.answers, Window(max_weight=1), weigh=lambda _: 5)]
    assert found == list(range(9))
    assert worker.most == 1


def test_parameters_are_taken_by_kind() -> None:
    given: dict[str, Any] = {"a": 3, "b": 2.5, "c": True, "d": "text", "e": 2**64 - 1}
    parameters = Parameters({name: to_parameter(value) for name, value in given.items()})
    assert parameters.integer("a") == 3
    assert (parameters.number("b"), parameters.flag("c"), parameters.text("d")) == (2.5, True, "text")
    assert parameters.integer("e") == 2**64 - 1
    parameters.finish()
    assert (parameters.integer("x"), parameters.number("x"), parameters.flag("x"), parameters.text("x")) == (
        None,
        None,
        False,
        "",
    )


@pytest.mark.parametrize(
    ("getter", "value"),
    [("integer", 2.0), ("integer", True), ("integer", "3"), ("number", "3"), ("flag", 1), ("text", 1)],
)
def test_parameters_of_another_kind_are_refused(getter: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="parameters: 'n' must be") as caught:
        getattr(Parameters({"n": to_parameter(value)}), getter)("n")
    assert caught.value.field == "parameters.n"


def test_a_parameter_that_nobody_asked_for_is_named() -> None:
    parameters = Parameters({"temprature": to_parameter(1.0)})
    parameters.number("temperature")
    with pytest.raises(InvalidRequest, match="'temprature' is no parameter here; there are: temperature"):
        parameters.finish()


def test_long_names_are_cut() -> None:
    assert len(quoted("a" * 70_000)) == 82


def of_images(num_images: int, num_bytes: int = 0) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[num_images])
    return pb.ModelInferRequest(model_name="m", inputs=[tensor], raw_input_contents=[bytes(num_bytes)])


def test_a_request_of_a_stream_weighs_what_its_images_or_its_bytes_do() -> None:
    assert [weight_of(of_images(count)) for count in (1, 100, 2**62, -1)] == [1, 100, 1024, 0]
    assert weight_of(of_images(1, 32 * 1024 * 1024)) == 128
    assert weight_of(pb.ModelInferRequest(model_name="words")) == 0


@pytest.mark.parametrize(("num_images", "most"), [(1, 32), (64, 4), (100, 3), (1000, 1)])
async def test_a_stream_has_so_many_images_in_work_as_the_other_streams(num_images: int, most: int) -> None:
    """Else one stream could hold all places of a model's queue, 32 times 1024 images."""
    scheduler = SimpleNamespace(admit=lambda *_, **__: contextlib.nullcontext())
    engine = SimpleNamespace(devices=SimpleNamespace(least_busy=lambda _: scheduler))
    servicer = OpenInferenceServicer(cast(Any, engine), lambda: True, lambda *_: None)
    under_way, seen, opened = 0, list[int](), asyncio.Event()

    async def answers(*_: object) -> AsyncGenerator[pb.ModelInferResponse, None]:
        nonlocal under_way
        under_way += 1
        seen.append(under_way)
        await opened.wait()
        under_way -= 1
        yield pb.ModelInferResponse()

    async def requests() -> AsyncGenerator[pb.ModelInferRequest, None]:
        for _ in range(40):
            yield of_images(num_images)

    cast(Any, servicer)._answers = answers
    context = SimpleNamespace(invocation_metadata=lambda: (), time_remaining=lambda: None)
    found = asyncio.create_task(_count(servicer.ModelStreamInfer(requests(), cast(Any, context))))
    for _ in range(100):
        await asyncio.sleep(0)
    assert max(seen) == most
    opened.set()
    assert await found == 40


async def _count(answers: AsyncGenerator[object, None]) -> int:
    return len([each async for each in answers])
