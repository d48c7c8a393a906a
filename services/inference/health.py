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
        self._models: dict[str, bool] = {}
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

    async def model(self, name: str, answers: bool | None) -> None:
        """Say whether model `name` answers; None where it is unknown from now on."""
        if answers is None:
            self._models.pop(name, None)
        else:
            self._models[name] = answers
        await self._tell(name)

    async def models(self, serving: Mapping[str, bool]) -> None:
        """Say which models answer; those not named are unknown from now on."""
        before, self._models = self._models, dict(serving)
        for name in {**before, **serving}:
            await self._tell(name)

    async def _tell(self, name: str) -> None:
        # As it is by now: while others were told, it may have changed.
        answers = self._models.get(name)
        status = _UNKNOWN if answers is None else _SERVING if answers else _NOT_SERVING
        await self.servicer.set(f"models/{name}", status)

    async def stopping(self) -> None:
        """Say, for good, that nothing answers any more."""
        self.is_ready, self._is_over = False, True
        await self.servicer.enter_graceful_shutdown()
