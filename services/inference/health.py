"""grpc.health.v1: the whole ("" and the services), and each model as `models/<name>`."""

from collections.abc import Mapping

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health

SERVICE = "tandem.v1.Inference"

WHOLE = ("", SERVICE, "inference.GRPCInferenceService")
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthBoard:
    """What the health service says; `servicer` is to be registered."""

    def __init__(self) -> None:
        self.servicer = health.HealthServicer()
        self._models: set[str] = set()
        self.is_ready = False
        self._is_over = False

    async def starting(self) -> None:
        """Say that the server does not answer yet."""
        for service in WHOLE:
            await self.servicer.set(service, _NOT_SERVING)

    async def ready(self) -> None:
        """Say that the server answers, unless it has failed or stops; again makes no difference."""
        if self.is_ready or self._is_over:
            return
        self.is_ready = True
        for service in WHOLE:
            await self.servicer.set(service, _SERVING)

    async def failed(self) -> None:
        """Say that the server can't answer any more, though it lives."""
        self.is_ready, self._is_over = False, True
        for service in WHOLE:
            await self.servicer.set(service, _NOT_SERVING)

    async def models(self, serving: Mapping[str, bool]) -> None:
        """Say which models answer; those not named are unknown from now on."""
        for name in self._models - serving.keys():
            await self.servicer.set(f"models/{name}", _UNKNOWN)
        for name, answers in serving.items():
            await self.servicer.set(f"models/{name}", _SERVING if answers else _NOT_SERVING)
        self._models = set(serving)

    async def stopping(self) -> None:
        """Say, for good, that nothing answers any more."""
        self.is_ready, self._is_over = False, True
        await self.servicer.enter_graceful_shutdown()
