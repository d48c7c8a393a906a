"""Refusing calls as they arrive, when so many come that what is let in is late already.

A device's queue refuses what it can't answer in time, but only once a call was received, parsed and admitted. gRPC
hands calls to Python one after another; at three times what the machine can do they pile up before it, where nothing is
known of them, each comes to the queue when its time is nearly over, and hardly one is answered. So it is watched how
many calls are late when they come or in the queue; while that is many, a share of the calls is refused as they arrive,
unparsed, so that the others come while they can be answered. The share follows what is seen, as CoDel's drops do
(Nichols and Jacobson 2012, ACM Queue 10(5)). The delay of the event loop is no sign: a model that is loaded holds it
up, and a swap is to fail no call. Nor is a call late that has no deadline.

A caller whose deadlines are shorter than the work has late calls on an idle server too, and nobody else is to suffer
for that: calls are shed only while more is asked for than the devices, or the one thread that hears all calls, can do.
The OIP's parameter `priority` is in the message, which is not read: callers say in the metadata that a call is urgent.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from services.inference.callers import priority_in
from services.inference.lanes import Priority
from services.inference.refusing import refusing
from tandem.errors import InvalidRequest, QueueFull

if TYPE_CHECKING:
    # Generic for the type checker alone.
    Handler = grpc.RpcMethodHandler[Any, Any]

TICK_S = 0.05
# Of calls that are late, a share that a server has now and then which keeps up.
MAX_LATE = 0.05
# Of few calls a share says nothing.
_FEW = 5
_RISE, _FALL, _MOST = 0.08, 0.01, 0.95
# Of a device's time, or of a core for the event loop: with less to do the server is not what makes calls late.
_BUSY = 0.7
RETRY_AFTER_S = 1.0
# Calls that bring work; those of operators and probes are always heard.
_SHED = (
    "/tandem.v1.Inference/Classify",
    "/tandem.v1.Inference/Compare",
    "/tandem.v1.Inference/Complete",
    "/tandem.v1.Inference/Score",
    "/inference.GRPCInferenceService/ModelInfer",
)


class Shedder(grpc.aio.ServerInterceptor):
    """Stands after those that note calls and ask who calls; `watch` is to run beside the server, on its event loop."""

    def __init__(
        self,
        num_late: Callable[[], int],
        asked_s: Callable[[], float],
        note_shed: Callable[[], None] = lambda: None,
    ) -> None:
        """`num_late` returns how many calls were late so far, when they came or in the queue; `asked_s` for how many
        seconds of a device they have asked; `note_shed` is told of each call that is refused here."""
        # Of the calls that are refused, 0 to 1.
        self.share = 0.0
        self._num_late, self._asked_s = num_late, asked_s
        self._late_before, self._asked_before_s = 0, 0.0
        self._num_let_in = 0
        self._owed = 0.0
        full = QueueFull(f"the server is overloaded; try again in {RETRY_AFTER_S:g} s", RETRY_AFTER_S)
        self._refusing = refusing(full, note_shed)

    async def watch(self) -> None:
        """Follow what happens; runs until cancelled."""
        while True:
            began_at, cpu_s = time.monotonic(), time.thread_time()
            await asyncio.sleep(TICK_S)
            self.note(time.monotonic() - began_at, time.thread_time() - cpu_s)

    def note(self, passed_s: float, cpu_s: float) -> None:
        """Take what happened in `passed_s` seconds into account, in which the event loop computed for `cpu_s`."""
        num_late, num_let_in, asked_s = self._num_late(), self._num_let_in, self._asked_s()
        late = (num_late - self._late_before) / num_let_in if num_let_in >= _FEW else 0.0
        # What was shed has asked for nothing here, but would have.
        wanted_s = (asked_s - self._asked_before_s) / (1 - self.share)
        is_busy = max(wanted_s, cpu_s) > _BUSY * passed_s
        self._late_before, self._asked_before_s, self._num_let_in = num_late, asked_s, 0
        if late > MAX_LATE and is_busy:
            self.share = min(_MOST, self.share + _RISE)
        else:
            self.share = max(0.0, self.share - _FALL)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the handler, or one that refuses."""
        if handler_call_details.method in _SHED:
            if self._is_shed(handler_call_details):
                return self._refusing
            self._num_let_in += 1
        return await continuation(handler_call_details)

    def _is_shed(self, details: grpc.HandlerCallDetails) -> bool:
        if not self.share or _is_urgent(details):
            return False
        # Evenly, not by chance: what is owed is carried over.
        self._owed += self.share
        if self._owed < 1:
            return False
        self._owed -= 1
        return True


def _is_urgent(details: grpc.HandlerCallDetails) -> bool:
    try:
        return priority_in(details.invocation_metadata or ()) is Priority.HIGH
    except InvalidRequest:
        return False
