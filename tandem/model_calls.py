"""What clients ask of the Models service besides its list: load, unload, aliases, shadows and the watch. See
`tandem.client`.
"""

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

from tandem.wire import convert
from tandem.wire.requests import (
    alias_request,
    shadow_request,
    shadows_request,
    unalias_request,
    unshadow_request,
)
from tandem.wire.results import AliasMove, LoadedModel, ModelChange, ModelsSnapshot, ShadowReport
from tandem.wire.shadows import shadow_from_wire
from tandem.wire.v1 import inference_pb2 as pb


class ModelCalls:
    """The part of the blocking client."""

    timeout_s: float
    _models: Any
    _errors: Callable[..., AbstractContextManager[None]]

    def load_model(self, reference: str) -> LoadedModel:
        """Put a model into service on the server, and load the version; raise what `get_model` does."""
        with self._errors():
            message = self._models.LoadModel(pb.LoadModelRequest(model=reference), timeout=self.timeout_s)
        return LoadedModel(convert.version_from_wire(message.model), message.load_ms)

    def unload_model(self, name: str) -> tuple[int, ...]:
        """Take model `name` out of service on the server; return the versions that were in memory."""
        with self._errors():
            message = self._models.UnloadModel(pb.UnloadModelRequest(name=name), timeout=self.timeout_s)
        return tuple(message.versions)

    def set_alias(self, name: str, alias: str, version: int) -> AliasMove:
        """Point `alias` of model `name` at `version`, for all servers of the volume."""
        request = alias_request(name, alias, version)
        with self._errors():
            message = self._models.SetAlias(request, timeout=self.timeout_s)
        return AliasMove(convert.info_from_wire(message.model), message.previous_version)

    def delete_alias(self, name: str, alias: str) -> AliasMove:
        """Take `alias` of model `name` away."""
        request = unalias_request(name, alias)
        with self._errors():
            message = self._models.DeleteAlias(request, timeout=self.timeout_s)
        return AliasMove(convert.info_from_wire(message.model), message.previous_version)

    def start_shadow(self, name: str, alias: str, candidate: str, share: float) -> ShadowReport:
        """Let `candidate`, a reference of a version, see a `share` (above 0, at most 1) of the calls of NAME@ALIAS."""
        request = shadow_request(name, alias, candidate, share)
        with self._errors():
            message = self._models.StartShadow(request, timeout=self.timeout_s)
        return shadow_from_wire(message.shadow)

    def get_shadows(self, name: str = "", alias: str = "") -> tuple[ShadowReport, ...]:
        """Return what the shadows of model `name` and `alias` have found; empty: of all."""
        request = shadows_request(name, alias)
        with self._errors():
            message = self._models.GetShadows(request, timeout=self.timeout_s)
        return tuple(map(shadow_from_wire, message.shadows))

    def stop_shadow(self, name: str, alias: str) -> ShadowReport:
        """End the shadow of NAME@ALIAS; return what it has found."""
        request = unshadow_request(name, alias)
        with self._errors():
            message = self._models.StopShadow(request, timeout=self.timeout_s)
        return shadow_from_wire(message.shadow)

    def watch_models(self) -> Generator[ModelsSnapshot | ModelChange, None, None]:
        """Yield all models, then each change; all again in place of changes that were read too late.

        Ends with ServerUnavailable or Unavailable when the server goes; leaving the loop ends the watch.
        """
        with self._errors():
            call = self._models.WatchModels(pb.WatchModelsRequest())
            try:
                for message in call:
                    if (update := convert.update_from_wire(message)) is not None:
                        yield update
            finally:
                call.cancel()


class AsyncModelCalls:
    """The part of the asyncio client."""

    timeout_s: float
    _models: Any
    _errors: Callable[..., AbstractContextManager[None]]

    async def load_model(self, reference: str) -> LoadedModel:
        """See ModelCalls.load_model."""
        with self._errors():
            message = await self._models.LoadModel(pb.LoadModelRequest(model=reference), timeout=self.timeout_s)
        return LoadedModel(convert.version_from_wire(message.model), message.load_ms)

    async def unload_model(self, name: str) -> tuple[int, ...]:
        """See ModelCalls.unload_model."""
        with self._errors():
            message = await self._models.UnloadModel(pb.UnloadModelRequest(name=name), timeout=self.timeout_s)
        return tuple(message.versions)

    async def set_alias(self, name: str, alias: str, version: int) -> AliasMove:
        """See ModelCalls.set_alias."""
        request = alias_request(name, alias, version)
        with self._errors():
            message = await self._models.SetAlias(request, timeout=self.timeout_s)
        return AliasMove(convert.info_from_wire(message.model), message.previous_version)

    async def delete_alias(self, name: str, alias: str) -> AliasMove:
        """See ModelCalls.delete_alias."""
        request = unalias_request(name, alias)
        with self._errors():
            message = await self._models.DeleteAlias(request, timeout=self.timeout_s)
        return AliasMove(convert.info_from_wire(message.model), message.previous_version)

    async def start_shadow(self, name: str, alias: str, candidate: str, share: float) -> ShadowReport:
        """See ModelCalls.start_shadow."""
        request = shadow_request(name, alias, candidate, share)
        with self._errors():
            message = await self._models.StartShadow(request, timeout=self.timeout_s)
        return shadow_from_wire(message.shadow)

    async def get_shadows(self, name: str = "", alias: str = "") -> tuple[ShadowReport, ...]:
        """See ModelCalls.get_shadows."""
        request = shadows_request(name, alias)
        with self._errors():
            message = await self._models.GetShadows(request, timeout=self.timeout_s)
        return tuple(map(shadow_from_wire, message.shadows))

    async def stop_shadow(self, name: str, alias: str) -> ShadowReport:
        """See ModelCalls.stop_shadow."""
        request = unshadow_request(name, alias)
        with self._errors():
            message = await self._models.StopShadow(request, timeout=self.timeout_s)
        return shadow_from_wire(message.shadow)

    async def watch_models(self) -> AsyncGenerator[ModelsSnapshot | ModelChange, None]:
        """See ModelCalls.watch_models."""
        with self._errors():
            call = self._models.WatchModels(pb.WatchModelsRequest())
            try:
                async for message in call:
                    if (update := convert.update_from_wire(message)) is not None:
                        yield update
            finally:
                call.cancel()
