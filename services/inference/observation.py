"""Each call as the operator sees it: one record from its headers to its end, and who is told of it then.

The record is found by whatever runs within the call (`current_call`). Listeners are told after the call has ended, on
the event loop, so they must be quick; metrics, the log of slow calls and traces are such listeners.
"""

import asyncio
import inspect
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from services.inference.context import Context, is_ours
from tandem.errors import TandemError, Unavailable
from tandem.wire.status import to_status

if TYPE_CHECKING:
    # Generic for the type checker alone.
    Handler = grpc.RpcMethodHandler[Any, Any]


# Of one call: a comparison of a whole dataset would have thousands.
MAX_STEPS = 64

_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}

log = logging.getLogger("tandem.inference")


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a call, by time.monotonic()."""

    name: str
    begun_at: float
    ended_at: float
    num_tokens: int = 0


@dataclass(eq=False, slots=True)
class Observed:
    """One call. `method` is package.Service/Method; what ends in _at is a time.monotonic() value, in _s seconds."""

    method: str
    begun_at: float
    peer: str = ""
    traceparent: str = ""
    tracestate: str = ""
    # Names of the registry, never what the caller wrote.
    models: list[str] = field(default_factory=list)
    num_items: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    decode_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    num_steps_left_out: int = 0
    # Of an internal error, as the caller was told.
    error_id: str = ""
    is_stream: bool = False
    first_answer_at: float | None = None
    ended_at: float = 0.0
    code: str = "OK"
    _call_id: str = ""

    @property
    def call_id(self) -> str:
        """What the log calls it; made when it is first asked for."""
        if not self._call_id:
            self._call_id = secrets.token_hex(4)
        return self._call_id

    @property
    def total_s(self) -> float:
        """From the headers to the end."""
        return self.ended_at - self.begun_at

    @property
    def first_answer_s(self) -> float:
        """From the headers to the first answer, or to the end of a call without one."""
        return (self.ended_at if self.first_answer_at is None else self.first_answer_at) - self.begun_at

    def add_step(self, name: str, begun_at: float, ended_at: float, num_tokens: int = 0) -> None:
        """Note a part of the call."""
        if len(self.steps) < MAX_STEPS:
            self.steps.append(Step(name, begun_at, ended_at, num_tokens))
        else:
            self.num_steps_left_out += 1

    def passed(self, models: Sequence[str], num_items: int, decode_s: float, queue_s: float, compute_s: float) -> None:
        """Note a passage through the scheduler; a stream of requests has several."""
        for model in models:
            if model and model not in self.models:
                self.models.append(model)
        self.num_items += num_items
        self.decode_s += decode_s
        self.queue_s += queue_s
        self.compute_s += compute_s


Listener = Callable[[Observed], None]

_current: ContextVar[Observed | None] = ContextVar("tandem_call", default=None)


def current_call() -> Observed | None:
    """Return the call within which this runs, or None."""
    return _current.get()


class Observer(grpc.aio.ServerInterceptor):
    """Makes the record of each call; it stands before all other interceptors, so that it sees what they refuse."""

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self.listeners = list(listeners)
        self._active: dict[Observed, asyncio.Task[Any]] = {}
        self._given_up: set[Observed] = set()
        self._idle: asyncio.Future[None] | None = None

    @property
    def num_active(self) -> int:
        """Calls under way of our own services."""
        return sum(is_ours(call.method) for call in self._active)

    async def idle(self) -> None:
        """Wait until no call of our own services is under way; one waits at a time."""
        if self.num_active:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle

    def end_all(self) -> None:
        """End what is under way with UNAVAILABLE."""
        self._end_each(list(self._active))

    def end_others(self) -> None:
        """End what is no call of our own services, such as watches of the health, which have no end of their own."""
        self._end_each([call for call in self._active if not is_ours(call.method)])

    def _end_each(self, calls: Sequence[Observed]) -> None:
        for call in calls:
            self._given_up.add(call)
            self._active[call].cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the handler, wrapped."""
        call = Observed(handler_call_details.method.removeprefix("/"), time.monotonic())
        for key, value in handler_call_details.invocation_metadata or ():
            if key == "traceparent":
                call.traceparent = str(value)
            elif key == "tracestate":
                call.tracestate = str(value)
        handler = await continuation(handler_call_details)
        return None if handler is None else self._wrapped(handler, call)

    def _wrapped(self, handler: Any, call: Observed) -> "Handler":
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        call.is_stream = bool(handler.request_streaming or handler.response_streaming)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._awaiting(handler.unary_unary, call), **coders)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._of(handler.unary_stream, call), **coders)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._awaiting(handler.stream_unary, call), **coders)
        return grpc.stream_stream_rpc_method_handler(self._of(handler.stream_stream, call), **coders)

    def _of(self, behaviour: Any, call: Observed) -> Any:
        yields = inspect.isasyncgenfunction(behaviour)
        return self._yielding(behaviour, call) if yields else self._awaiting(behaviour, call)

    def _awaiting(self, behaviour: Any, call: Observed) -> Any:
        async def observed(request: Any, context: Context) -> Any:
            self._begin(call, context)
            failure: BaseException | None = None
            try:
                return await behaviour(request, context)
            except BaseException as error:
                failure = error
                await self._say_if_stopping(call, context, error)
                raise
            finally:
                self._end(call, context, failure)

        return observed

    def _yielding(self, behaviour: Any, call: Observed) -> Any:
        async def observed(request: Any, context: Context) -> AsyncIterator[Any]:
            self._begin(call, context)
            failure: BaseException | None = None
            answers = None
            try:
                answers = behaviour(request, context)
                async for answer in answers:
                    if call.first_answer_at is None:
                        call.first_answer_at = time.monotonic()
                    yield answer
            except BaseException as error:
                failure = error
                await self._say_if_stopping(call, context, error)
                raise
            finally:
                if answers is not None:
                    await answers.aclose()
                self._end(call, context, failure)

        return observed

    def _begin(self, call: Observed, context: Context) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._active[call] = task
        call.peer = context.peer()
        _current.set(call)

    async def _say_if_stopping(self, call: Observed, context: Context, error: BaseException) -> None:
        if call not in self._given_up or not isinstance(error, asyncio.CancelledError):
            return
        self._given_up.discard(call)
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
        status = to_status(Unavailable("the server is stopping and gave this call up; try again"))
        await context.abort(status.code, status.message, status.trailing_metadata)

    def _end(self, call: Observed, context: Context, failure: BaseException | None) -> None:
        self._active.pop(call, None)
        if self._idle is not None and not self._idle.done() and not self.num_active:
            self._idle.set_result(None)
        call.ended_at = time.monotonic()
        call.code = _code(context, failure)
        # After the answer has gone out: nobody waits for what is noted of it.
        asyncio.get_running_loop().call_soon(self._tell, call)

    def _tell(self, call: Observed) -> None:
        for listener in self.listeners:
            try:
                listener(call)
            except Exception:
                log.exception("a call could not be noted")


def _code(context: Any, failure: BaseException | None) -> str:
    if failure is None or (said := _name(context.code())):
        return "OK" if failure is None else said
    if isinstance(failure, asyncio.CancelledError | GeneratorExit):
        remaining_s = context.time_remaining()
        return "CANCELLED" if remaining_s is None or remaining_s > 0 else "DEADLINE_EXCEEDED"
    if isinstance(failure, TandemError):
        return str(to_status(failure).code.name)
    return "UNKNOWN"


def _name(code: Any) -> str:
    """Return the name of what gRPC keeps as a number or as a StatusCode; "" for OK, which is what it begins with."""
    found = code if isinstance(code, grpc.StatusCode) else _BY_NUMBER.get(code, grpc.StatusCode.OK)
    return "" if found is grpc.StatusCode.OK else str(found.name)
