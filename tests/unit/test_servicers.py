"""The edge of the service: what a handler raises, and what its caller is told."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, cast

import grpc
import pytest

from services.inference.boundary import Boundary
from services.inference.servicers import InferenceServicer
from tandem.errors import CheckpointCorrupt, InvalidRequest, QueueFull
from tandem.wire.status import DETAILS_KEY, PUSHBACK_KEY
from tandem.wire.v1 import inference_pb2 as pb

METHOD = "/tandem.v1.Inference/Classify"


class Aborted(grpc.aio.AbortError):
    """What `abort` raises."""


class FakeContext:
    """Remembers how the call was ended."""

    def __init__(self, remaining_s: float | None = None) -> None:
        self.ended: tuple[grpc.StatusCode, str, dict[str, Any]] | None = None
        self._remaining_s = remaining_s

    def time_remaining(self) -> float | None:
        return self._remaining_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> NoReturn:
        self.ended = (code, details, dict(trailing_metadata))
        raise Aborted(details)


class FakeDetails:
    """Names the method that is called."""

    def __init__(self, method: str = METHOD) -> None:
        self.method = method
        self.invocation_metadata = ()


async def wrapped(handler: Any, method: str = METHOD) -> Any:
    async def continuation(details: Any) -> Any:
        return handler

    return await Boundary("/secret/home").intercept_service(continuation, cast(Any, FakeDetails(method)))


async def ended_by(error: BaseException) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """Return how a unary call ends whose handler raises `error`."""

    async def behaviour(request: Any, context: Any) -> None:
        raise error

    handler = await wrapped(grpc.unary_unary_rpc_method_handler(behaviour))
    context = FakeContext()
    with pytest.raises(Aborted):
        await handler.unary_unary(None, context)
    assert context.ended is not None
    return context.ended


async def test_errors_of_ours_keep_their_line_without_the_volumes_path() -> None:
    code, message, metadata = await ended_by(CheckpointCorrupt("/secret/home/runs/r1/x is\n altered"))
    assert (code, message) == (grpc.StatusCode.DATA_LOSS, "x is altered")
    assert b"secret" not in metadata[DETAILS_KEY]


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("m:2 can't be served: {}/runs/r/checkpoints/step-1/m.json is gone", "m:2 can't be served: m.json is gone"),
        ("{}/runs/r/checkpoints/step-1 is no checkpoint", "step-1 is no checkpoint"),
        ("{0}/a/b and {0}/c/d", "b and d"),
        ("can't write {}: full", "can't write $TANDEM_HOME: full"),
    ],
)
async def test_of_a_path_the_name_is_told(inside: str, outside: str) -> None:
    assert (await ended_by(CheckpointCorrupt(inside.format("/secret/home"))))[1] == outside


async def test_a_full_queue_carries_the_pushback() -> None:
    code, _, metadata = await ended_by(QueueFull("full"))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(metadata[PUSHBACK_KEY]) > 0


async def test_what_was_not_foreseen_is_opaque_outside_and_traced_inside(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        code, message, _ = await ended_by(ZeroDivisionError("the secret"))
    assert code == grpc.StatusCode.INTERNAL
    assert "secret" not in message
    identifier = message.split()[2].rstrip(";")
    assert identifier in caplog.text
    assert "ZeroDivisionError: the secret" in caplog.text


async def test_a_stray_cancellation_ends_the_call_with_a_status() -> None:
    code, _, _ = await ended_by(asyncio.CancelledError())
    assert code == grpc.StatusCode.UNAVAILABLE


async def test_a_caller_who_leaves_cancels_the_handler_and_no_more() -> None:
    released = asyncio.Event()

    async def behaviour(request: Any, context: Any) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            released.set()

    handler = await wrapped(grpc.unary_unary_rpc_method_handler(behaviour))
    context = FakeContext()
    task = asyncio.create_task(handler.unary_unary(None, context))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert released.is_set()
    assert context.ended is None


async def test_a_stream_ends_with_the_status_after_what_was_said() -> None:
    closed = []

    async def behaviour(request: Any, context: Any) -> AsyncIterator[int]:
        try:
            yield 1
            raise InvalidRequest("no more", field="x")
        finally:
            closed.append(True)

    handler = await wrapped(grpc.unary_stream_rpc_method_handler(behaviour))
    context = FakeContext()
    answers = handler.unary_stream(None, context)
    assert await anext(answers) == 1
    with pytest.raises(Aborted):
        await anext(answers)
    assert closed == [True]
    assert context.ended is not None
    assert context.ended[0] == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_abandoned_stream_is_closed_at_once() -> None:
    closed = []

    async def behaviour(request: Any, context: Any) -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    handler = await wrapped(grpc.unary_stream_rpc_method_handler(behaviour))
    answers = handler.unary_stream(None, FakeContext())
    assert await anext(answers) == 1
    await answers.aclose()
    assert closed == [True]


async def test_services_of_others_are_left_alone() -> None:
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, context: None)
    assert await wrapped(handler, "/grpc.health.v1.Health/Check") is handler
    assert await wrapped(None) is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda servicer, context: servicer.Classify(pb.ClassifyRequest(model="m"), context), "no images"),
        (
            lambda servicer, context: servicer.Classify(pb.ClassifyRequest(model="m", top_k=-3), context),
            "top_k is -3",
        ),
        (lambda servicer, context: servicer.Compare(pb.CompareRequest(), context), "no images"),
        (
            lambda servicer, context: anext(servicer.Generate(pb.GenerateRequest(model="m", prompt=" "), context)),
            "the prompt is empty",
        ),
        (
            lambda servicer, context: anext(
                servicer.Generate(pb.GenerateRequest(model="m", prompt="é" * 600_000), context)
            ),
            "1,048,576 bytes",
        ),
        (
            lambda servicer, context: anext(
                servicer.Generate(pb.GenerateRequest(sampling=pb.SamplingParameters(repetition_penalty=0.0)), context)
            ),
            "repetition_penalty is 0.0",
        ),
        (
            lambda servicer, context: servicer.Classify(
                pb.ClassifyRequest(model="m", top_k=1000, images=[pb.Image(data=b"x")] * 101), context
            ),
            "the limit is 100,000",
        ),
        (
            lambda servicer, context: servicer.Compare(
                pb.CompareRequest(top_k=100_000, images=[pb.Image(data=b"x")] * 2), context
            ),
            "the limit is 100,000",
        ),
        (
            lambda servicer, context: anext(servicer.CompareDataset(pb.CompareDatasetRequest(top_k=1000), context)),
            "the limit is 100,000",
        ),
        (
            lambda servicer, context: anext(
                servicer.Generate(pb.GenerateRequest(sampling=pb.SamplingParameters(max_words=-1)), context)
            ),
            "max_words is -1",
        ),
    ],
)
async def test_requests_are_checked_before_anything_is_asked_of_the_engine(
    call: Callable[[InferenceServicer, FakeContext], Any], says: str
) -> None:
    # Whatever would be asked of this engine would fail.
    servicer = InferenceServicer(cast(Any, None), Boundary("/").status)
    with pytest.raises(InvalidRequest, match=says):
        await call(servicer, FakeContext(remaining_s=1.0))
