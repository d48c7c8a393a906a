"""Calls that are refused before anything is read of them."""

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc

from services.inference.context import Context
from tandem.errors import TandemError
from tandem.wire.status import WireStatus, to_status

if TYPE_CHECKING:
    # Generic for the type checker alone.
    Handler = grpc.RpcMethodHandler[Any, Any]


def refusing(error: TandemError, told: Callable[[], None] = lambda: None) -> "Handler":
    """Return a handler that ends a call with `error` at once, and calls `told`.

    As a stream of requests, whatever the method is: of those nothing is read, let alone parsed, before it is asked for.
    Five refusals of 60 MiB took 188 ms so, and 820 ms as single messages.
    """
    status = to_status(error)

    async def refuse(_: AsyncIterator[bytes], context: Context) -> None:
        told()
        await _abort(context, status)

    return grpc.stream_stream_rpc_method_handler(refuse)


async def end(context: Context, error: TandemError) -> None:
    """End a call with `error`."""
    await _abort(context, to_status(error))


async def _abort(context: Context, status: WireStatus) -> None:
    await context.abort(status.code, status.message, status.trailing_metadata)
