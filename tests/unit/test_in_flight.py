"""Messages in the server: counted from when they are parsed until their work ends, refused where they are too much."""

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from waiting import until

from services.inference.admission import Lobby
from services.inference.boundary import Boundary
from services.inference.in_flight import InFlight, message_bytes, working_on
from services.inference.messages import Malformed
from services.inference.servicers import InferenceServicer
from services.inference.streams import Window, in_order
from tandem.errors import InvalidRequest, QueueFull
from tandem.wire.status import DETAILS_KEY
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

CLASSIFY, STREAM = "/tandem.v1.Inference/Classify", "/tandem.v1.Inference/ClassifyStream"
Behaviour = Callable[[Any, Any], Any]


class Aborted(grpc.aio.AbortError):
    """What `abort` raises."""


class FakeContext:
    """Remembers how the call was ended."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.trailing: dict[str, Any] = {}

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> NoReturn:
        self.code, self.trailing = code, dict(trailing_metadata)
        raise Aborted(details)


class FakeDetails:
    """Names the method that is called."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


async def call_of(boundary: Boundary, handler: Any, method: str = CLASSIFY) -> Any:
    """Return the handler that one call gets."""

    async def continuation(details: Any) -> Any:
        return handler

    return await boundary.intercept_service(continuation, cast(Any, FakeDetails(method)))


def unary(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    return grpc.unary_unary_rpc_method_handler(behaviour, request_deserializer=pb.ClassifyRequest.FromString)


def message(num_bytes: int) -> bytes:
    """Return a request of that many bytes, 10 to 100."""
    data = pb.ClassifyRequest(model="x" * (num_bytes - 2)).SerializeToString()
    assert len(data) == num_bytes
    return data


async def test_a_message_counts_until_its_call_ends_however_it_does() -> None:
    boundary, seen = Boundary("/", InFlight(100)), list[int]()

    async def behaviour(request: Any, context: Any) -> None:
        seen.append(message_bytes())
        assert boundary.in_flight.num_bytes == 60
        if request.model.endswith("y"):
            raise InvalidRequest("no")

    for data in (message(60), message(60)[:-1] + b"y"):
        handler = await call_of(boundary, unary(behaviour))
        request = handler.request_deserializer(data)
        assert boundary.in_flight.num_bytes == 60
        context = FakeContext()
        if request.model.endswith("y"):
            with pytest.raises(Aborted):
                await handler.unary_unary(request, context)
        else:
            await handler.unary_unary(request, context)
        assert boundary.in_flight.num_bytes == 0
    assert seen == [60, 60]
    assert message_bytes() == 60, "of this context, in which the call ran"


async def test_what_is_too_much_with_the_others_is_refused_unparsed_with_a_time_to_try_again() -> None:
    boundary, waits = Boundary("/", InFlight(100)), asyncio.Event()

    async def behaviour(request: Any, context: Any) -> None:
        await waits.wait()

    first, second, probe = [await call_of(boundary, unary(behaviour)) for _ in range(3)]
    under_way = asyncio.create_task(first.unary_unary(first.request_deserializer(message(60)), FakeContext()))
    refused = second.request_deserializer(message(41))
    assert isinstance(refused, Malformed)
    assert isinstance(refused.error, QueueFull)
    context = FakeContext()
    with pytest.raises(Aborted, match="have 60 bytes, and 100 are the limit; try again in 1 s"):
        await second.unary_unary(refused, context)
    assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert context.trailing["grpc-retry-pushback-ms"] == "1000"
    retry = error_details_pb2.RetryInfo()
    rich = status_pb2.Status.FromString(context.trailing[DETAILS_KEY])
    assert any(detail.Unpack(retry) for detail in rich.details)
    assert retry.retry_delay.seconds == 1
    # What was refused holds nothing; up to the limit, and without bytes, others are let in.
    assert boundary.in_flight.num_bytes == 60
    assert not isinstance(second.request_deserializer(message(40)), Malformed)
    assert not isinstance(probe.request_deserializer(b""), Malformed)
    waits.set()
    await under_way


def test_a_message_on_its_own_is_let_in_whatever_it_has() -> None:
    in_flight = InFlight(100)
    in_flight.take(1000)
    with pytest.raises(QueueFull):
        in_flight.take(1)
    in_flight.give(1000)
    in_flight.take(1)


async def test_what_a_call_held_is_given_back_where_its_handler_never_ran() -> None:
    boundary = Boundary("/", InFlight(100))

    async def behaviour(request: Any, context: Any) -> None:
        raise AssertionError("it ran")

    handler = await call_of(boundary, unary(behaviour))
    handler.request_deserializer(message(60))
    assert boundary.in_flight.num_bytes == 60
    del handler
    gc.collect()
    assert boundary.in_flight.num_bytes == 0


class Streams:
    """Calls of a stream whose requests are worked on until they are let go of."""

    def __init__(self, boundary: Boundary) -> None:
        self.boundary, self.done = boundary, dict[str, asyncio.Event]()
        self.sizes = dict[str, int]()

    async def behaviour(self, requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        async def answer(request: Any) -> AsyncGenerator[Any, None]:
            self.sizes[request.id] = message_bytes()
            await self.done.setdefault(request.id, asyncio.Event()).wait()
            yield request.id

        answers = in_order(requests, answer, Window())
        try:
            async for each in answers:
                yield each
        finally:
            await answers.aclose()

    async def call(self, data: "asyncio.Queue[bytes | None]", context: FakeContext) -> list[str]:
        handler = await call_of(
            self.boundary,
            grpc.stream_stream_rpc_method_handler(
                cast(Any, self.behaviour), request_deserializer=cast(Any, pb.ClassifyStreamRequest.FromString)
            ),
            STREAM,
        )

        async def requests() -> AsyncGenerator[Any, None]:
            while (each := await data.get()) is not None:
                yield handler.request_deserializer(each)

        return [answer async for answer in handler.stream_stream(requests(), context)]


def streamed(name: str, num_bytes: int) -> bytes:
    request = pb.ClassifyStreamRequest(id=name, request=pb.ClassifyRequest(model="x" * (num_bytes - 7)))
    assert request.ByteSize() == num_bytes
    return request.SerializeToString()


async def test_each_message_of_a_stream_counts_for_as_long_as_its_own_work() -> None:
    streams = Streams(Boundary("/", InFlight(100)))
    in_flight, data = streams.boundary.in_flight, asyncio.Queue[bytes | None]()
    call = asyncio.create_task(streams.call(data, FakeContext()))
    for name, size in (("a", 40), ("b", 50)):
        data.put_nowait(streamed(name, size))
    await until(lambda: len(streams.sizes) == 2)
    assert (in_flight.num_bytes, streams.sizes) == (90, {"a": 40, "b": 50})
    # The second is done before the first is answered.
    streams.done["b"].set()
    await until(lambda: in_flight.num_bytes == 40)
    data.put_nowait(streamed("c", 60))
    await until(lambda: len(streams.sizes) == 3)
    assert in_flight.num_bytes == 100
    for each in streams.done.values():
        each.set()
    data.put_nowait(None)
    assert await call == ["a", "b", "c"]
    assert in_flight.num_bytes == 0


async def test_a_message_that_is_too_much_ends_its_stream_once_those_before_are_answered() -> None:
    streams, context = Streams(Boundary("/", InFlight(100))), FakeContext()
    data = asyncio.Queue[bytes | None]()
    call = asyncio.create_task(streams.call(data, context))
    for name in "ab":
        data.put_nowait(streamed(name, 60))
    await until(lambda: "a" in streams.done)
    streams.done["a"].set()
    with pytest.raises(Aborted):
        await call
    assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert list(streams.sizes) == ["a"]
    assert streams.boundary.in_flight.num_bytes == 0


async def test_a_stream_that_is_given_up_holds_nothing() -> None:
    streams, data = Streams(Boundary("/", InFlight(100))), asyncio.Queue[bytes | None]()
    call = asyncio.create_task(streams.call(data, FakeContext()))
    for name in "ab":
        data.put_nowait(streamed(name, 45))
    await until(lambda: len(streams.sizes) == 2)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert streams.boundary.in_flight.num_bytes == 0


async def test_the_lobby_counts_the_messages_of_streams_too() -> None:
    boundary, lobby, done = Boundary("/", InFlight(1000)), Lobby(num_bytes=100, num_calls=10), asyncio.Event()

    async def behaviour(requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        async def answer(request: Any) -> AsyncGenerator[Any, None]:
            with lobby.wait():
                await done.wait()
            yield request.id

        async for each in in_order(requests, answer, Window()):
            yield each

    streams = Streams(boundary)
    streams.behaviour = behaviour  # type: ignore[method-assign]
    data = asyncio.Queue[bytes | None]()
    call = asyncio.create_task(streams.call(data, FakeContext()))
    data.put_nowait(streamed("a", 70))
    await until(lambda: lobby.num_bytes == 70)
    other = Boundary("/", InFlight(1000))

    async def waiting(request: Any, context: Any) -> None:
        with lobby.wait():
            raise AssertionError("it was let in")

    handler, context = await call_of(other, unary(waiting)), FakeContext()
    with pytest.raises(Aborted):
        await handler.unary_unary(handler.request_deserializer(message(31)), context)
    assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    done.set()
    data.put_nowait(None)
    assert await call == ["a"]
    assert (lobby.num_bytes, lobby.num_calls) == (0, 0)


def test_outside_a_call_nothing_is_counted() -> None:
    with working_on(pb.ClassifyRequest()):
        assert message_bytes() == 0


async def test_over_grpc_calls_are_refused_and_what_left_is_counted_no_longer() -> None:
    boundary, done = Boundary("/", InFlight(100)), asyncio.Event()

    async def classify(request: Any, context: Any) -> Any:
        await done.wait()
        return pb.ClassifyResponse()

    async def classify_stream(requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        async def answer(request: Any) -> AsyncGenerator[Any, None]:
            await done.wait()
            yield pb.ClassifyStreamResponse(id=request.id)

        async for each in in_order(requests, answer, Window()):
            yield each

    server = grpc.aio.server(interceptors=(boundary,))
    servicer: Any = InferenceServicer(cast(Any, None), boundary.status)
    servicer.Classify, servicer.ClassifyStream = classify, classify_stream
    rpc.add_InferenceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def held(num_bytes: int) -> None:
        await until(lambda: boundary.in_flight.num_bytes == num_bytes)

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        one, requests = pb.ClassifyRequest.FromString(message(60)), asyncio.Queue[bytes | None]()

        async def sent() -> AsyncGenerator[Any, None]:
            while (each := await requests.get()) is not None:
                yield pb.ClassifyStreamRequest.FromString(each)

        unary_call = stub.Classify(one)
        await held(60)
        for refused in (stub.Classify(one), stub.ClassifyStream(iter([pb.ClassifyStreamRequest(request=one)]))):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (refused if hasattr(refused, "__await__") else refused.read())
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert ("grpc-retry-pushback-ms", "1000") in tuple(caught.value.trailing_metadata() or ())
        await held(60)
        unary_call.cancel()
        await held(0)
        streaming = stub.ClassifyStream(sent())
        requests.put_nowait(streamed("a", 70))
        await held(70)
        streaming.cancel()
        await held(0)
        done.set()
        assert await stub.Classify(one) == pb.ClassifyResponse()
        await held(0)
    await server.stop(None)
