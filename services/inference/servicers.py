"""The services of tandem.v1: convert, call, convert. Errors are mapped in `boundary`."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from services.inference.classify import EncodedImage, classify, off_the_loop
from services.inference.compare import compare, compare_dataset
from services.inference.engine import Engine
from services.inference.generate import generate
from services.inference.loading import ServedClassifier, version_of
from tandem.checkpoints.registry import describe
from tandem.errors import TandemError
from tandem.generation.prompts import pick_seed
from tandem.models.sampling import Sampling
from tandem.wire import convert
from tandem.wire.results import ModelDetails, ModelInfo, TextPiece
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(rpc.InferenceServicer):
    """Classify, Compare, CompareDataset and Generate."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        """The top_k classes of each image."""
        answer = await classify(self._engine, request.model, _images(request.images), request.top_k, _deadline(context))
        num_scored = sum(len(result.top_k) for result in answer.results)
        return await off_the_loop(num_scored, lambda: convert.classification_to_wire(answer))

    async def Compare(self, request: pb.CompareRequest, context: Context) -> pb.CompareResponse:
        """The same images through two classifiers."""
        answer = await compare(
            self._engine,
            request.model_a,
            request.model_b,
            _images(request.images),
            request.top_k,
            _deadline(context),
        )
        num_scored = sum(len(result.a) + len(result.b) for result in answer.results)
        return await off_the_loop(num_scored, lambda: convert.comparison_to_wire(answer))

    async def CompareDataset(
        self, request: pb.CompareDatasetRequest, context: Context
    ) -> AsyncIterator[pb.CompareDatasetResponse]:
        """A split of a dataset through two classifiers, with progress."""
        steps = compare_dataset(
            self._engine,
            request.model_a,
            request.model_b,
            request.dataset,
            request.split,
            request.top_k,
            request.limit,
            _deadline(context),
        )
        # Closed with the call, not when the collector comes round: it holds a place in the queue.
        async with aclosing(steps):
            async for step in steps:
                num_scored = sum(len(result.a) + len(result.b) for result in step.found)
                wire = partial(convert.dataset_progress_to_wire, step.progress, step.found)
                message = await off_the_loop(num_scored, wire)
                if step.summary is not None:
                    message.MergeFrom(convert.dataset_end_to_wire(step.summary, step.timings))
                yield message

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        """Text, as it is drawn."""
        parameters = request.sampling
        pieces = generate(
            self._engine,
            request.model,
            request.prompt if request.HasField("prompt") else None,
            parameters.max_words,
            _sampling(parameters),
            _deadline(context),
        )
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, TextPiece):
                    yield convert.piece_to_wire(piece)
                else:
                    yield convert.generation_to_wire(piece)


class ModelsServicer(rpc.ModelsServicer):
    """ListModels and GetModel."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Every model with its versions; one whose registry files are damaged is left out."""
        del request, context
        documents = await asyncio.to_thread(self._describe_all)
        return pb.ListModelsResponse(models=[convert.info_to_wire(self._info(each)) for each in documents])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """One version, by reference."""
        del context
        served = await self._engine.models.get(request.model)
        card = served.card
        details = ModelDetails(version_of(served), card.kind, card.metrics, card.num_parameters)
        message = convert.details_to_wire(details)
        if isinstance(served, ServedClassifier):
            message.class_ids.extend(each.id for each in served.card.classes)
            message.image_size = served.card.preprocessing.image_size
        else:
            message.vocabulary_size = served.card.vocabulary_size
        return message

    def _describe_all(self) -> list[dict[str, Any]]:
        registry = self._engine.models.registry
        documents = []
        for name in registry.names():
            try:
                documents.append(describe(registry, name))
            except TandemError:
                continue
        return documents

    def _info(self, document: dict[str, Any]) -> ModelInfo:
        return ModelInfo(
            name=document["name"],
            kind=document["kind"],
            latest=document["latest"],
            aliases=document["aliases"],
            versions=tuple(document["versions"]),
            loaded=self._engine.models.loaded_versions(document["name"]),
        )


def _images(messages: Iterable[pb.Image]) -> list[EncodedImage]:
    return [EncodedImage(each.name, each.data, each.label) for each in messages]


def _sampling(parameters: pb.SamplingParameters) -> Sampling:
    return Sampling(
        temperature=parameters.temperature if parameters.HasField("temperature") else 1.0,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        seed=parameters.seed if parameters.HasField("seed") else pick_seed(),
        allow_unknown=parameters.allow_unknown,
        min_p=parameters.min_p,
        repetition_penalty=parameters.repetition_penalty if parameters.HasField("repetition_penalty") else 1.0,
        stop=tuple(parameters.stop),
        random_start=parameters.random_start,
    )


def _deadline(context: Context) -> float | None:
    """Return when the caller stops waiting, as a time.monotonic() value."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s
