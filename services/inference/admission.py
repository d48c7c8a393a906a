"""What may be in the server at once: items and bytes of the queue, items of one model, streams."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from services.inference.in_flight import message_bytes
from services.inference.lanes import Lane
from tandem.errors import QueueFull
from tandem.wire.limits import MAX_LOBBY_BYTES, MAX_MODEL_ITEMS, MAX_QUEUE_BYTES, MAX_QUEUE_ITEMS, MAX_STREAMS

# Told where nothing is known yet of how long the work takes.
RETRY_AFTER_S = 1.0
_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 30.0


# Why a call is refused: the four bounds; it would be late, as far as can be told; it was late in the queue; it came
# when too many came late (`shedding`).
REASONS = ("items", "bytes", "model_items", "streams", "deadline", "late", "overload")


@dataclass(frozen=True)
class Limits:
    """The bounds; see tandem.wire.limits."""

    items: int = MAX_QUEUE_ITEMS
    model_items: int = MAX_MODEL_ITEMS
    num_bytes: int = MAX_QUEUE_BYTES
    streams: int = MAX_STREAMS


@dataclass(frozen=True)
class Load:
    """What one call brings: `num_items` for each of its lanes (once, without lanes)."""

    num_items: int
    lanes: Sequence[Lane] = ()
    num_bytes: int = 0
    stream: bool = False

    @property
    def num_all_items(self) -> int:
        """Items over all lanes."""
        return self.num_items * max(1, len(self.lanes))


class Room:
    """What the calls of now hold. A call on its own is always let in: its own size has its own limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_items = self.num_bytes = self.num_streams = 0
        self.refusals = dict.fromkeys(REASONS, 0)

    def refuse(self, reason: str) -> None:
        """Count a call that is refused, for one of REASONS."""
        self.refusals[reason] += 1

    def enter(self, load: Load, backlog_s: float) -> None:
        """Hold room for `load`; raise QueueFull if there is none. `backlog_s` is what the queue is good for."""
        limits = self.limits
        self._check("the queue", self.num_items, load.num_all_items, limits.items, "items", backlog_s)
        self._check("the queue", self.num_bytes, load.num_bytes, limits.num_bytes, "bytes", backlog_s)
        for lane in load.lanes:
            share_s = backlog_s * lane.num_admitted / max(1, self.num_items)
            self._check(
                "the queue of this model", lane.num_admitted, load.num_items, limits.model_items, "model_items", share_s
            )
        if load.stream:
            self._check("the table of streams", self.num_streams, 1, limits.streams, "streams", 0.0)
        self._count(load, 1)

    def leave(self, load: Load) -> None:
        """Give back what `load` held."""
        self._count(load, -1)

    def _check(self, what: str, held: int, wanted: int, limit: int, reason: str, backlog_s: float) -> None:
        if not held or held + wanted <= limit:
            return
        self.refuse(reason)
        unit = reason.removeprefix("model_")
        # What is too much must go first: that share of the backlog.
        share = min(1.0, (held + wanted - limit) / held)
        retry_after_s = min(max(backlog_s * share, _MIN_RETRY_S), _MAX_RETRY_S) if backlog_s else RETRY_AFTER_S
        raise QueueFull(f"{what} is full ({held} of {limit} {unit}); try again in {retry_after_s:.2g} s", retry_after_s)

    def _count(self, load: Load, sign: int) -> None:
        self.num_items += sign * load.num_all_items
        self.num_bytes += sign * load.num_bytes
        self.num_streams += sign * load.stream
        for lane in load.lanes:
            lane.num_admitted += sign * load.num_items


class Lobby:
    """Calls that wait for their model to be loaded, before they have a place: what their messages hold is bounded."""

    def __init__(self, num_bytes: int = MAX_LOBBY_BYTES, num_calls: int = MAX_MODEL_ITEMS) -> None:
        self._max_bytes, self._max_calls = num_bytes, num_calls
        self.num_bytes = self.num_calls = 0

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Count the message that is worked on here; raise QueueFull if too much waits already."""
        num_bytes = message_bytes()
        is_full = self.num_calls >= self._max_calls or self.num_bytes + num_bytes > self._max_bytes
        if self.num_calls and is_full:
            raise QueueFull(
                f"{self.num_calls} calls wait for their models to be loaded; try again in {RETRY_AFTER_S:g} s",
                RETRY_AFTER_S,
            )
        self.num_calls += 1
        self.num_bytes += num_bytes
        try:
            yield
        finally:
            self.num_calls -= 1
            self.num_bytes -= num_bytes
