"""Whose work the threads that decode take next: plain state, without threads, and with the clock handed in.

A call brings its work in groups. The urgent go first; among equally urgent calls the one that has had no turn for
longest, so that calls take turns, group by group. A call that has had none for PROMOTE_AFTER_S counts as one priority
higher, so that the urgent never starve the rest.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from services.inference.lanes import PROMOTE_AFTER_S, Priority

G = TypeVar("G")


class CallInOrder(Generic[G]):
    """What of one call waits for a turn: `groups`, in their order."""

    def __init__(self, priority: Priority, groups: Iterable[G]) -> None:
        self.priority = priority
        self.groups = deque(groups)
        # When it came, or had its last turn.
        self.since = 0.0
        self.is_gone = False


class DecodeOrder(Generic[G]):
    """The calls that have groups which wait."""

    def __init__(self, promote_after_s: float = PROMOTE_AFTER_S) -> None:
        self._promote_after_s = promote_after_s
        # By priority, each in the order of `since`.
        self._calls = tuple(OrderedDict[CallInOrder[G], None]() for _ in Priority)

    def add(self, call: CallInOrder[G], now: float) -> None:
        """Let `call` wait, behind its equals."""
        call.since = now
        if call.groups:
            self._calls[call.priority][call] = None

    def take(self, now: float) -> tuple[CallInOrder[G], G] | None:
        """Return the group whose turn it is, which waits no longer, and its call; None if nothing waits."""
        heads = [next(iter(calls)) for calls in self._calls if calls]
        if not heads:
            return None
        call = min(heads, key=lambda head: (self._urgency(head, now), head.since))
        calls, group = self._calls[call.priority], call.groups.popleft()
        call.since = now
        if call.groups:
            calls.move_to_end(call)
        else:
            calls.pop(call)
        return call, group

    def put_back(self, call: CallInOrder[G], group: G, now: float) -> bool:
        """Let `group`, which was taken and is not done, wait for the next turn of its call; False if that is gone."""
        if call.is_gone:
            return False
        call.groups.appendleft(group)
        if call not in self._calls[call.priority]:
            self.add(call, now)
        return True

    def drop(self, call: CallInOrder[G]) -> list[G]:
        """Forget `call`; return what of it still waited."""
        call.is_gone, left = True, list(call.groups)
        call.groups.clear()
        self._calls[call.priority].pop(call, None)
        return left

    def drain(self) -> list[G]:
        """Drop all calls that wait; return what of them did."""
        return [group for waiting in self._calls for call in list(waiting) for group in self.drop(call)]

    def _urgency(self, call: CallInOrder[G], now: float) -> int:
        return max(0, call.priority - int((now - call.since) / self._promote_after_s))
