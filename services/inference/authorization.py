"""Who may call what: one table of scopes, asked before a byte of the request is read."""

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from services.inference.context import Context
from services.inference.health import WHOLE
from services.inference.refusing import end, refusing
from services.inference.tokens import ADMIN, PREDICT, TokenFile
from tandem.access import TOKEN_FILE
from tandem.errors import AccessDenied, PermissionDenied, Unauthenticated

if TYPE_CHECKING:
    # Generic for the type checker alone.
    Handler = grpc.RpcMethodHandler[Any, Any]


# For probes, which have no token. Health answers for the whole alone: a model's name is for those who may predict.
OPEN = ""
_HEALTH = ("grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch")
# A method, or else its service; what is in neither form needs ADMIN.
_SCOPES = {
    "tandem.v1.Inference": PREDICT,
    "tandem.v1.Models": ADMIN,
    "tandem.v1.Models/ListModels": PREDICT,
    "tandem.v1.Models/GetModel": PREDICT,
    "tandem.v1.Models/WatchModels": PREDICT,
    "tandem.v1.Models/GetShadows": PREDICT,
    "inference.GRPCInferenceService": ADMIN,
    "inference.GRPCInferenceService/ServerLive": OPEN,
    "inference.GRPCInferenceService/ServerReady": OPEN,
    "inference.GRPCInferenceService/ServerMetadata": PREDICT,
    "inference.GRPCInferenceService/ModelReady": PREDICT,
    "inference.GRPCInferenceService/ModelMetadata": PREDICT,
    "inference.GRPCInferenceService/ModelConfig": PREDICT,
    "inference.GRPCInferenceService/ModelStatistics": PREDICT,
    "inference.GRPCInferenceService/ModelInfer": PREDICT,
    "inference.GRPCInferenceService/ModelStreamInfer": PREDICT,
    "inference.GRPCInferenceService/RepositoryIndex": PREDICT,
    "grpc.health.v1.Health": PREDICT,
    _HEALTH[0]: OPEN,
    _HEALTH[1]: OPEN,
    # It tells the contract, which is public, and which services there are: of use to those who may call them.
    "grpc.reflection.v1alpha.ServerReflection": PREDICT,
    "grpc.reflection.v1.ServerReflection": PREDICT,
}
_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)


def scope_of(method: str) -> str:
    """Return the scope that `method`, "/package.Service/Method", needs; OPEN for none."""
    name = method.removeprefix("/")
    return _SCOPES.get(name, _SCOPES.get(name.partition("/")[0], ADMIN))


class Authorization(grpc.aio.ServerInterceptor):
    """Lets calls through whose bearer token has the scope of their method."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the handler, or one that refuses."""
        method = handler_call_details.method
        scope = scope_of(method)
        try:
            granted = self._granted(handler_call_details.invocation_metadata or ())
        except Unauthenticated as error:
            if scope != OPEN:
                return refusing(error)
            handler = await continuation(handler_call_details)
            return _of_the_whole(handler, error) if handler and method.removeprefix("/") in _HEALTH else handler
        handler = await continuation(handler_call_details)
        if handler is None or scope == OPEN or scope in granted:
            return handler
        return refusing(PermissionDenied(f"the token of this call lacks the scope {scope}, which {method[1:]} needs"))

    def _granted(self, metadata: Any) -> frozenset[str]:
        """Return the scopes of the call's token; raise Unauthenticated, which does not repeat it."""
        values = [value for key, value in metadata if key == "authorization"]
        if not values:
            raise Unauthenticated(f"this server wants a token with each call: name a file with one in {TOKEN_FILE}")
        found = _BEARER.fullmatch(values[0]) if len(values) == 1 and isinstance(values[0], str) else None
        granted = self._tokens.scopes(found[1]) if found else None
        if granted is None:
            raise Unauthenticated(f"this server does not know the token of the call: name another file in {TOKEN_FILE}")
        return granted


def _of_the_whole(handler: Any, error: AccessDenied) -> "Handler":
    """Return the health check `handler` for callers without a token: the whole is told, no model."""
    coders = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }

    async def check(request: Any, context: Context) -> Any:
        if request.service not in WHOLE:
            await end(context, error)
        return await handler.unary_unary(request, context)

    async def watch(request: Any, context: Context) -> Any:
        if request.service not in WHOLE:
            await end(context, error)
        return await handler.unary_stream(request, context)

    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(check, **coders)
    return grpc.unary_stream_rpc_method_handler(watch, **coders)
