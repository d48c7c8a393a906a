"""ClassifyStream: requests of Classify by the stream, answered in their order and a bounded number at a time."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from services.inference.context import StatusOf
from services.inference.engine import Engine
from services.inference.scheduler import Priority
from services.inference.streams import Window, in_order
from tandem.errors import QueueFull
from tandem.wire.limits import MAX_STREAM_BYTES, MAX_STREAM_IMAGES
from tandem.wire.status import to_rich
from tandem.wire.v1 import inference_pb2 as pb

METHOD = "/tandem.v1.Inference/ClassifyStream"
# A request counts for its images, or for as many as its bytes would be at this size, whichever is more.
_IMAGE_BYTES = MAX_STREAM_BYTES // MAX_STREAM_IMAGES

Classify = Callable[[pb.ClassifyRequest], Awaitable[pb.ClassifyResponse]]


async def classify_stream(
    engine: Engine,
    requests: AsyncIterator[pb.ClassifyStreamRequest],
    classify: Classify,
    status_of: StatusOf,
    deadline: float | None,
    priority: Priority = Priority.NORMAL,
) -> AsyncGenerator[pb.ClassifyStreamResponse, None]:
    """Yield the answer to each of `requests`, or its error as `status_of` tells it.

    Raises QueueFull where too many streams are open, and what `requests` raises. Closed, it gives up what is in work.
    """

    async def answer(request: pb.ClassifyStreamRequest) -> AsyncGenerator[pb.ClassifyStreamResponse, None]:
        try:
            response = await _once_there_is_room(lambda: classify(request.request), deadline)
        except BaseException as error:
            status = status_of(METHOD, error)
            if status is None:
                raise
            yield pb.ClassifyStreamResponse(id=request.id, error=to_rich(status))
        else:
            yield pb.ClassifyStreamResponse(id=request.id, response=response)

    # A place among the streams alone: each request takes its own in the queue.
    with engine.devices.least_busy(priority).admit(0, deadline=deadline, priority=priority, stream=True):
        answers = in_order(requests, answer, Window(max_weight=MAX_STREAM_IMAGES), weight)
        async with aclosing(answers):
            async for each in answers:
                yield each


def weight(request: pb.ClassifyStreamRequest) -> int:
    """Return how much of MAX_STREAM_IMAGES `request` takes."""
    return max(len(request.request.images), request.ByteSize() // _IMAGE_BYTES)


async def _once_there_is_room(
    ask: Callable[[], Awaitable[pb.ClassifyResponse]], deadline: float | None
) -> pb.ClassifyResponse:
    """Return what `ask` does; where the server is full, ask again when it says, and read no further meanwhile."""
    while True:
        try:
            return await ask()
        except QueueFull as full:
            if deadline is not None and time.monotonic() + full.retry_after_s > deadline:
                raise
            await asyncio.sleep(full.retry_after_s)
