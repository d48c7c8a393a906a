"""What clients send on ClassifyStream: a batch of images a message, all answered by the version that answers the first.

So the second message waits for the first answer. The requests are read in a thread or task of gRPC's own, where an
error would be lost: it is kept, ends the requests, and is raised once what went out before is answered.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

from tandem.wire import convert
from tandem.wire.requests import Images, Received, classify_request, image_messages
from tandem.wire.results import Classification
from tandem.wire.status import from_rich
from tandem.wire.v1 import inference_pb2 as pb

# A batch of the server's, so that answers come soon and several messages are in work.
_IMAGES = 32
_BYTES = 4 * 1024 * 1024


class _Bulk:
    def __init__(self, model: str, images: Images, top_k: int, received: Received) -> None:
        self._model, self._top_k, self._received = model, top_k, received
        self._chunks = image_messages(images, top_k, _IMAGES, _BYTES)
        self._error: Exception | None = None

    def _next(self, number: int) -> pb.ClassifyStreamRequest | None:
        """Return the request with the next images; None after the last, or where they can't be had."""
        try:
            chunk = next(self._chunks, None)
            if chunk is None:
                return None
            request = classify_request(self._model, chunk, self._top_k)
        except Exception as error:  # noqa: BLE001 - it is raised where the answers are read
            self._error = error
            return None
        return pb.ClassifyStreamRequest(id=str(number), request=request)

    def take(self, message: pb.ClassifyStreamResponse) -> Classification:
        """Return the answer in `message`; raise the error in it."""
        if message.HasField("error"):
            raise from_rich(message.error)
        answer = convert.classification_from_wire(message.response)
        self._model = answer.model.label
        self._received.count += len(answer.results)
        return answer

    def finish(self) -> None:
        """Raise what the images ended with, if they did not end by themselves."""
        if self._error is not None:
            raise self._error


class Bulk(_Bulk):
    """The requests of a blocking client."""

    def __init__(self, model: str, images: Images, top_k: int, received: Received) -> None:
        super().__init__(model, images, top_k, received)
        self._answered = threading.Event()
        self._left = False

    def requests(self) -> Iterator[pb.ClassifyStreamRequest]:
        """Yield them."""
        number = 0
        while not self._left and (request := self._next(number)) is not None:
            yield request
            self._answered.wait()
            number += 1

    def take(self, message: pb.ClassifyStreamResponse) -> Classification:
        """See _Bulk."""
        answer = super().take(message)
        self._answered.set()
        return answer

    def leave(self) -> None:
        """Yield no more requests."""
        self._left = True
        self._answered.set()


class AsyncBulk(_Bulk):
    """The requests of an asyncio client."""

    def __init__(self, model: str, images: Images, top_k: int, received: Received) -> None:
        super().__init__(model, images, top_k, received)
        self._answered = asyncio.Event()

    async def requests(self) -> AsyncIterator[pb.ClassifyStreamRequest]:
        """Yield them."""
        number = 0
        while (request := self._next(number)) is not None:
            yield request
            await self._answered.wait()
            number += 1

    def take(self, message: pb.ClassifyStreamResponse) -> Classification:
        """See _Bulk."""
        answer = super().take(message)
        self._answered.set()
        return answer
