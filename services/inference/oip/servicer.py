"""GRPCInferenceService: convert, call, convert. Errors are mapped in `boundary`, but for those within a stream."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from services.inference.callers import deadline_of, priority_of
from services.inference.context import Context, StatusOf
from services.inference.engine import Engine
from services.inference.loading import Served, ServedClassifier
from services.inference.oip import classifiers, describe, texts
from services.inference.oip.fields import named
from services.inference.oip.parameters import quoted, to_parameter
from services.inference.streams import Window, in_order
from tandem.checkpoints.references import ModelReference, parse_reference
from tandem.checkpoints.registry import Version
from tandem.errors import CheckpointCorrupt, InvalidRequest, ModelUnloaded, NotFound, TandemError
from tandem.wire.limits import MAX_IMAGES, MAX_STREAM_BYTES, MAX_STREAM_IMAGES, limits_metadata
from tandem.wire.oip import grpc_service_pb2 as pb
from tandem.wire.oip import grpc_service_pb2_grpc as rpc
from tandem.wire.status import WireStatus

SERVICE = "inference.GRPCInferenceService"
# A caller with this set to "true" in its metadata wants a stream to end with the status of the first error.
_STATUS_KEY = "triton_grpc_error"
# As in ClassifyStream: a request counts for its images, or for as many as its bytes would be at this size.
_IMAGE_BYTES = MAX_STREAM_BYTES // MAX_STREAM_IMAGES
_VERSION = re.compile(r"[0-9]{1,9}")


class OpenInferenceServicer(rpc.GRPCInferenceServiceServicer):
    """The protocol's core, and of its well-known superset what concerns models; `status_of` is the boundary's."""

    def __init__(self, engine: Engine, is_ready: Callable[[], bool], status_of: StatusOf) -> None:
        self._engine = engine
        self._is_ready = is_ready
        self._status_of = status_of

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """True."""
        del request, context
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """What the health service says of the whole."""
        del request, context
        return pb.ServerReadyResponse(ready=self._is_ready())

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Name, version and extensions; begins with the limits as metadata."""
        del request
        await context.send_initial_metadata(limits_metadata(len(self._engine.devices)))
        return describe.server_metadata()

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Whether a model answers; one that is not in memory is loaded to find out."""
        del context
        try:
            await self._served(request)
        except (NotFound, ModelUnloaded, CheckpointCorrupt):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Versions, inputs and outputs."""
        del context
        served = await self._served(request)
        versions: list[int] = []
        if (version := served.located.version) is not None:
            known = await asyncio.to_thread(self._engine.models.registry.versions, version.name)
            versions = [each.version for each in known]
        return describe.model_metadata(request.name, served, versions)

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """Inputs, outputs, and how requests are batched."""
        del context
        served = await self._served(request)
        return pb.ModelConfigResponse(config=describe.model_config(request.name, served))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        """Logits, probabilities or labels of images; a text, whole."""
        with named("model_name", "model_version"):
            reference = _reference(request.model_name, request.model_version)
            served = await self._engine.models.get(reference)
            if isinstance(served, ServedClassifier):
                return await classifiers.infer(self._engine, served, request, context)
            return await texts.infer(self._engine, served, reference, request, context)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """The same for each request of a stream; a text as it is drawn."""
        answers = in_order(
            request_iterator,
            lambda request: self._answers_or_error(request, context),
            Window(max_weight=MAX_STREAM_IMAGES),
            weight_of,
        )
        # A place among the streams alone: each request takes its own in the queue.
        priority = priority_of(context)
        scheduler = self._engine.devices.least_busy(priority)
        with scheduler.admit(0, deadline=deadline_of(context), priority=priority, stream=True):
            async with aclosing(answers):
                async for answer in answers:
                    yield answer

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """Of the versions in memory, of one model or of all."""
        del context
        if request.name or request.version:
            with named("name"):
                reference = _reference(_plain(request.name), request.version)
            await asyncio.to_thread(self._engine.models.registry.resolve, reference)
        number = int(request.version or 0)
        loaded = [
            served
            for served in self._engine.models.loaded()
            if (version := served.located.version) is not None
            and request.name in ("", version.name)
            and number in (0, version.version)
        ]
        statistics = self._engine.devices.statistics
        return pb.ModelStatisticsResponse(
            model_stats=[describe.model_statistics(served, statistics(served)) for served in loaded]
        )

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """Every version of the registry, and whether it is in memory, or why it can't be."""
        del context
        _check_repository(request.repository_name)
        models = [self._index(each) for each in await asyncio.to_thread(self._all_versions)]
        return pb.RepositoryIndexResponse(
            models=[each for each in models if each.state == "READY" or not request.ready]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Put a model back into service and load it."""
        del context
        _check_repository(request.repository_name)
        if request.parameters:
            raise InvalidRequest("a model is what its checkpoint says: load it without parameters", field="parameters")
        with named("model_name"):
            await self._engine.models.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Take a model out of service and memory."""
        del context
        _check_repository(request.repository_name)
        for name in request.parameters:
            if name != "unload_dependents":
                raise InvalidRequest(f"{quoted(name)} is no parameter here", field="parameters")
        with named("model_name"):
            await self._engine.models.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def _served(self, request: pb.ModelReadyRequest | pb.ModelMetadataRequest | pb.ModelConfigRequest) -> Served:
        with named("name"):
            return await self._engine.models.get(_reference(request.name, request.version))

    async def _answers(
        self, request: pb.ModelInferRequest, context: Context
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        reference = _reference(request.model_name, request.model_version)
        served = await self._engine.models.get(reference)
        if isinstance(served, ServedClassifier):
            answer = await classifiers.infer(self._engine, served, request, context)
            answer.parameters[texts.FINAL].CopyFrom(to_parameter(True))
            yield answer
            return
        async with aclosing(texts.stream(self._engine, served, reference, request, context)) as pieces:
            async for piece in pieces:
                yield piece

    async def _answers_or_error(
        self, request: pb.ModelInferRequest, context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        try:
            async with aclosing(self._answers(request, context)) as answers:
                async for answer in answers:
                    yield pb.ModelStreamInferResponse(infer_response=answer)
        except BaseException as error:
            status = None if _wants_status(context) else self._status_of(f"/{SERVICE}/ModelStreamInfer", error)
            if status is None:
                raise
            yield _error(request, status)

    def _all_versions(self) -> list[Version]:
        registry, found = self._engine.models.registry, list[Version]()
        for name in registry.names():
            try:
                found.extend(registry.versions(name))
            except TandemError:
                # One whose files are damaged, as ListModels leaves it out.
                continue
        return found

    def _public(self, reason: str) -> str:
        status = self._status_of(f"/{SERVICE}/RepositoryIndex", CheckpointCorrupt(reason))
        return status.message if status else ""

    def _index(self, version: Version) -> pb.RepositoryIndexResponse.ModelIndex:
        models, state, reason = self._engine.models, "", "not in memory; the first call loads it"
        if models.is_unloaded(version.name):
            state, reason = "UNAVAILABLE", "unloaded"
        elif version.version in models.loaded_versions(version.name):
            state, reason = "READY", ""
        elif said := models.changes.failures(version.name).get(version.version):
            state, reason = "UNAVAILABLE", self._public(said)
        return pb.RepositoryIndexResponse.ModelIndex(
            name=version.name, version=str(version.version), state=state, reason=reason
        )


def weight_of(request: pb.ModelInferRequest) -> int:
    """Return how much of MAX_STREAM_IMAGES `request` takes, by the shapes that it states."""
    # What states more than a message may have is refused, and a text has one.
    num_images = max((each.shape[0] for each in request.inputs if each.shape), default=0)
    return max(min(num_images, MAX_IMAGES), request.ByteSize() // _IMAGE_BYTES)


def _reference(name: str, version: str) -> str:
    """Return the model reference of a name and a version, which may be empty; raise InvalidRequest."""
    if not version:
        parse_reference(name)
        return name
    if not _VERSION.fullmatch(version):
        raise InvalidRequest(f"{quoted(version)} is no version; they are 1, 2, …", field="version")
    return f"{_plain(name)}:{int(version)}"


def _plain(name: str) -> str:
    """Return `name`; raise InvalidRequest if it is not that of a model alone."""
    if parse_reference(name) != ModelReference(name):
        raise InvalidRequest(f"{quoted(name)} names more than a model: give its name alone", field="model")
    return name


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest(f"there is no repository {quoted(name)}; leave the name out", field="repository_name")


def _wants_status(context: Any) -> bool:
    return (_STATUS_KEY, "true") in [(key, value) for key, value in context.invocation_metadata() or ()]


def _error(request: pb.ModelInferRequest, status: WireStatus) -> pb.ModelStreamInferResponse:
    answer = pb.ModelInferResponse(model_name=request.model_name, model_version=request.model_version, id=request.id)
    for name, value in (("status", status.code.name), (texts.FINAL, True)):
        answer.parameters[name].CopyFrom(to_parameter(value))
    return pb.ModelStreamInferResponse(error_message=status.message, infer_response=answer)
