"""The edge of the service: every error becomes a status here, and nothing of the inside crosses the wire.

An error of ours keeps its one line, less the volume's path: a file on it keeps its name. Any other becomes INTERNAL
with an id; its traceback goes to the log under that id.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from services.inference.context import Context, is_ours
from services.inference.in_flight import CallMessages, InFlight
from services.inference.messages import Malformed, bounded
from services.inference.observation import current_call
from tandem.errors import TandemError
from tandem.wire.status import WireStatus, to_status

log = logging.getLogger("tandem.inference")

if TYPE_CHECKING:
    # Generic for the type checker alone.
    Handler = grpc.RpcMethodHandler[Any, Any]


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our own services; `home` is the path to keep from clients."""

    def __init__(self, home: str, in_flight: InFlight | None = None) -> None:
        self._home = home
        self.in_flight = InFlight() if in_flight is None else in_flight
        # The directories below it are named by us or from the allow-list: no spaces in them.
        self._folders = re.compile(re.escape(home) + r"/(?:[^\s/]+/)*")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the handler, wrapped."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not is_ours(method):
            return handler
        messages = CallMessages(self.in_flight)
        coders = {
            "request_deserializer": messages.counted(bounded(method, handler.request_deserializer)),
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, method, messages), **coders)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream, method, messages), **coders)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._unary(handler.stream_unary, method, messages), **coders)
        return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream, method, messages), **coders)

    def _unary(self, behaviour: Any, method: str, messages: CallMessages) -> Any:
        async def call(request: Any, context: Context) -> Any:
            messages.begin(request)
            try:
                return await behaviour(_well_formed(request), context)
            except BaseException as error:
                await self._refuse(context, method, error)
                raise
            finally:
                messages.end()

        return call

    def _stream(self, behaviour: Any, method: str, messages: CallMessages) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            messages.begin(request)
            answers = None
            try:
                answers = behaviour(_well_formed(request), context)
                async for answer in answers:
                    yield answer
            except BaseException as error:
                await self._refuse(context, method, error)
                raise
            finally:
                if answers is not None:
                    await answers.aclose()
                messages.end()

        return call

    async def _refuse(self, context: Context, method: str, error: BaseException) -> None:
        """End the call with the status of `error`; return only if it must be raised as it is."""
        status = self.status(method, error)
        if status is not None:
            await context.abort(status.code, status.message, status.trailing_metadata)

    def _public(self, error: TandemError) -> str:
        return self._folders.sub("", " ".join(str(error).split())).replace(self._home, "$TANDEM_HOME")

    def status(self, method: str, error: BaseException) -> WireStatus | None:
        """Return what the caller of `method` is told of `error`; None if it must be raised as it is."""
        if isinstance(error, TandemError):
            return to_status(error, self._public(error))
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # The caller has gone, or the server stops: gRPC itself asked for this.
                return None
            # A stray one would leave the call without an end (grpc #29248).
            return WireStatus(grpc.StatusCode.UNAVAILABLE, "the server gave the work up; try again", ())
        if not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return None
        identifier = secrets.token_hex(4)
        if (call := current_call()) is not None:
            call.error_id = identifier
        fields = {"error_id": identifier}
        log.error("internal error %s in %s", identifier, method, exc_info=error, extra={"fields": fields})
        return WireStatus(
            grpc.StatusCode.INTERNAL, f"internal error {identifier}; the server's log has it under this id", ()
        )


def _well_formed(request: Any) -> Any:
    """Return the request, or the stream of requests, which raises where one of them is none."""
    if isinstance(request, Malformed):
        raise request.error
    return _each_well_formed(request) if hasattr(request, "__aiter__") else request


async def _each_well_formed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Malformed):
            raise request.error
        yield request
