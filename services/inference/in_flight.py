"""The bytes of the messages that are in the server: counted where they are parsed, bounded for all calls together.

Admission counts what waits for a device. A message is there before, and longer: while it is converted, while its model
is loaded, and in a stream while it waits for room. It counts until its call ends; of a stream, until its own work does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from services.inference.messages import Malformed
from tandem.errors import QueueFull
from tandem.wire.limits import MAX_IN_FLIGHT_BYTES

RETRY_AFTER_S = 1.0


class InFlight:
    """The bytes of all messages. One on its own is always let in, and one without bytes too: a probe, say."""

    def __init__(self, max_bytes: int = MAX_IN_FLIGHT_BYTES) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Count a message; raise QueueFull if it is too much with those that are here."""
        if self.num_bytes and num_bytes and self.num_bytes + num_bytes > self._max_bytes:
            raise QueueFull(
                f"the messages in the server have {self.num_bytes:,} bytes, and {self._max_bytes:,} are the limit; try "
                f"again in {RETRY_AFTER_S:g} s",
                RETRY_AFTER_S,
            )
        self.num_bytes += num_bytes

    def give(self, num_bytes: int) -> None:
        """Count it no longer."""
        self.num_bytes -= num_bytes


class CallMessages:
    """What the messages of one call hold of `in_flight`."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self._num_bytes = 0
        # By id(): protobuf's messages can't be keys.
        self._sizes: dict[int, int] = {}

    def __del__(self) -> None:
        # Whatever became of the call: what were counted for ever would shut the server.
        self.end()

    def counted(self, parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        """Return `parse`, which no message comes to that is too much: that is Malformed, and its handler is told."""

        def read(data: bytes) -> Any:
            try:
                self._in_flight.take(len(data))
            except QueueFull as full:
                return Malformed(full)
            self._num_bytes += len(data)
            message = parse(data)
            self._sizes[id(message)] = len(data)
            return message

        return read

    def begin(self, request: Any) -> None:
        """Let what runs from here on within this context find its call, and how large its message is."""
        _call.set(self)
        _size.set(self._sizes.get(id(request), 0))

    @contextmanager
    def working_on(self, message: Any) -> Iterator[None]:
        """Count `message` within this, and then no longer."""
        _size.set(self._sizes.get(id(message), 0))
        try:
            yield
        finally:
            size = self._sizes.pop(id(message), 0)
            self._num_bytes -= size
            self._in_flight.give(size)

    def end(self) -> None:
        """Give back what is held."""
        # The collector may end a call in a thread of its own, where even counting nothing could undo what is counted.
        if self._num_bytes:
            self._in_flight.give(self._num_bytes)
        self._num_bytes = 0
        self._sizes.clear()


_call: ContextVar[CallMessages | None] = ContextVar("tandem_messages", default=None)
_size: ContextVar[int] = ContextVar("tandem_message_bytes", default=0)


def message_bytes() -> int:
    """Return the size of the message that is worked on here; 0 outside a call, and of a stream as a whole."""
    return _size.get()


@contextmanager
def working_on(message: Any) -> Iterator[None]:
    """Work on a message of a stream, in a task of its own: it counts until this ends."""
    call = _call.get()
    if call is None:
        yield
        return
    with call.working_on(message):
        yield
