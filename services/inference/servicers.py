"""The services of tandem.v1: convert, call, convert. Errors are mapped in `boundary`."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial

from services.inference.callers import deadline_of as _deadline
from services.inference.callers import priority_of as _priority
from services.inference.changes import describe_all, with_public_failures, with_public_reasons
from services.inference.classify import GivenImage, classify, off_the_loop
from services.inference.classify_stream import classify_stream
from services.inference.compare import compare
from services.inference.compare_dataset import DatasetQuestion, compare_dataset
from services.inference.context import Context, StatusOf
from services.inference.engine import Engine
from services.inference.generate import generate
from services.inference.loading import ServedClassifier, runtime_of, version_of
from services.inference.score import score
from services.inference.shadow_servicer import ShadowServicer
from tandem.data.raw_image import RawImage
from tandem.errors import CheckpointCorrupt, InvalidName, InvalidRequest, VolumeReadOnly
from tandem.generation.prompts import check_max_words, check_num_texts, pick_seed
from tandem.models.sampling import Sampling
from tandem.names import check_name
from tandem.wire import convert
from tandem.wire.limits import MAX_ANSWERS, limits_metadata
from tandem.wire.results import ModelDetails, ModelInfo, TextPiece
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc


class InferenceServicer(rpc.InferenceServicer):
    """Predictions and text; `status_of` is the boundary's, for errors within a stream."""

    def __init__(self, engine: Engine, status_of: StatusOf) -> None:
        self._engine = engine
        self._status_of = status_of

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        """The top_k classes of each image."""
        answer = await classify(
            self._engine,
            request.model,
            _images(request.images),
            request.top_k,
            _deadline(context),
            _priority(context),
        )
        num_scored = sum(len(result.top_k) for result in answer.results)
        return await off_the_loop(num_scored, lambda: convert.classification_to_wire(answer))

    async def ClassifyStream(
        self, request_iterator: AsyncIterator[pb.ClassifyStreamRequest], context: Context
    ) -> AsyncGenerator[pb.ClassifyStreamResponse, None]:
        """The same for each request of a stream."""
        answers = classify_stream(
            self._engine,
            request_iterator,
            lambda request: self.Classify(request, context),
            self._status_of,
            _deadline(context),
            _priority(context),
        )
        async with aclosing(answers):
            async for answer in answers:
                yield answer

    async def Compare(self, request: pb.CompareRequest, context: Context) -> pb.CompareResponse:
        """The same images through two classifiers."""
        answer = await compare(
            self._engine,
            request.model_a,
            request.model_b,
            _images(request.images),
            request.top_k,
            _deadline(context),
            _priority(context),
        )
        num_scored = sum(len(result.a) + len(result.b) for result in answer.results)
        return await off_the_loop(num_scored, lambda: convert.comparison_to_wire(answer))

    async def CompareDataset(
        self, request: pb.CompareDatasetRequest, context: Context
    ) -> AsyncIterator[pb.CompareDatasetResponse]:
        """A split of a dataset through two classifiers, with progress."""
        question = DatasetQuestion(
            request.model_a,
            request.model_b,
            request.dataset,
            request.split,
            request.top_k,
            request.limit,
            request.num_returned_images,
        )
        steps = compare_dataset(self._engine, question, _deadline(context), _priority(context))
        # Closed with the call, not when the collector comes round: it holds a place in the queue.
        async with aclosing(steps):
            async for step in steps:
                num_scored = sum(len(result.a) + len(result.b) for result in step.found)
                wire = partial(convert.dataset_progress_to_wire, step.progress, step.found, step.images)
                message = await off_the_loop(num_scored, wire)
                if step.summary is not None:
                    message.MergeFrom(convert.dataset_end_to_wire(step.summary, step.timings))
                yield message

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Text, as it is drawn."""
        parameters = request.sampling
        pieces = generate(
            self._engine,
            request.model,
            request.prompt if request.HasField("prompt") else None,
            parameters.max_words,
            _sampling(parameters),
            _deadline(context),
            _priority(context),
            request.num_texts,
        )
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, TextPiece):
                    yield convert.piece_to_wire(piece)
                else:
                    yield convert.generation_to_wire(piece)

    async def Complete(self, request: pb.GenerateRequest, context: Context) -> pb.CompleteResponse:
        """The same text, whole."""
        check_answer(request)
        texts: dict[int, list[str]] = {}
        completions: dict[int, pb.Completion] = {}
        # What a generator holds is given up with the call.
        async with aclosing(self.Generate(request, context)) as messages:
            async for message in messages:
                completion = completions.setdefault(message.text_index, pb.Completion())
                texts.setdefault(message.text_index, []).append(message.text)
                completion.words.extend(message.words)
                completion.log_probabilities.extend(message.log_probabilities)
                completion.alternatives.extend(message.alternatives)
                if message.HasField("summary"):
                    completion.summary.CopyFrom(message.summary)
        for index, pieces in texts.items():
            completions[index].text = "".join(pieces)
        return pb.CompleteResponse(completions=[completions[index] for index in sorted(completions)])

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """The log-probabilities of given texts."""
        answer = await score(
            self._engine,
            request.model,
            request.texts,
            request.num_alternatives,
            request.first_is_given,
            _deadline(context),
            _priority(context),
        )
        num_scored = sum(result.summary.num_tokens for result in answer.results) * (1 + request.num_alternatives)
        return await off_the_loop(num_scored, lambda: convert.scoring_to_wire(answer))


def check_answer(request: pb.GenerateRequest) -> None:
    """Raise InvalidRequest where the texts of `request` in one message could hold more than MAX_ANSWERS."""
    num_texts = check_num_texts(request.num_texts)
    num_words = num_texts * check_max_words(request.sampling.max_words)
    num_answers = num_words * (1 + max(0, request.sampling.num_alternatives))
    if num_answers > MAX_ANSWERS:
        raise InvalidRequest(
            f"{num_words:,} words with {request.sampling.num_alternatives} alternatives each make {num_answers:,} "
            f"answers; the limit is {MAX_ANSWERS:,} in a message: ask Generate, which streams them",
            field="sampling.max_words",
        )


class ModelsServicer(ShadowServicer, rpc.ModelsServicer):
    """What the registry holds; ListModels and GetModel publish the limits in their initial metadata.

    `status_of` is the boundary's: it has the reasons of failures as callers may see them.
    """

    def __init__(self, engine: Engine, status_of: StatusOf) -> None:
        self._engine = engine
        self._status_of = status_of

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Every model with its versions; one whose registry files are damaged is left out."""
        del request
        await context.send_initial_metadata(limits_metadata(len(self._engine.devices)))
        documents = await asyncio.to_thread(describe_all, self._engine.models.registry)
        infos = map(self._engine.models.changes.info, documents.values())
        return pb.ListModelsResponse(models=map(self._to_wire, infos))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """One version, by reference."""
        await context.send_initial_metadata(limits_metadata(len(self._engine.devices)))
        served = await self._engine.models.get(request.model)
        card = served.card
        runtime = runtime_of(served)
        details = ModelDetails(
            version_of(served),
            card.kind,
            card.metrics,
            card.num_parameters,
            runtime=runtime,
            memory_bytes=served.footprint.num_bytes,
            devices=self._engine.devices.names(),
        )
        message = convert.details_to_wire(details)
        if isinstance(served, ServedClassifier):
            message.class_ids.extend(each.id for each in served.card.classes)
            message.image_size = served.card.preprocessing.image_size
        else:
            message.vocabulary_size = served.card.vocabulary_size
        return message

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        """Put a model into service and load it."""
        del context
        begun_at = time.monotonic()
        served = await self._engine.models.load(request.model)
        load_ms = (time.monotonic() - begun_at) * 1000
        return pb.LoadModelResponse(model=convert.version_to_wire(version_of(served)), load_ms=load_ms)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        """Take a model out of service and memory."""
        del context
        name = _model_name(request.name)
        versions = self._engine.models.loaded_versions(name)
        await self._engine.models.unload(name)
        return pb.UnloadModelResponse(versions=versions)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Point an alias at a version; by the end of the call this server answers by it."""
        del context
        name = _model_name(request.name)
        if request.version < 1:
            raise InvalidRequest(f"version is {request.version}; they are 1, 2, …", field="version")
        with _unless_read_only():
            set_alias = self._engine.models.registry.set_alias
            before = await asyncio.to_thread(set_alias, name, request.alias, request.version, "SetAlias")
        return pb.SetAliasResponse(model=await self._after_a_move(name), previous_version=before or 0)

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        """Take an alias away."""
        del context
        name = _model_name(request.name)
        with _unless_read_only():
            delete_alias = self._engine.models.registry.delete_alias
            before = await asyncio.to_thread(delete_alias, name, request.alias, "DeleteAlias")
        return pb.DeleteAliasResponse(model=await self._after_a_move(name), previous_version=before)

    async def WatchModels(
        self, request: pb.WatchModelsRequest, context: Context
    ) -> AsyncGenerator[pb.WatchModelsResponse, None]:
        """All models, then each change."""
        del request, context
        async with aclosing(self._engine.models.changes.watch()) as updates:
            async for update in updates:
                yield convert.update_to_wire(with_public_reasons(update, self._public))

    async def _after_a_move(self, name: str) -> pb.Model:
        await self._engine.models.follow(name)
        return self._to_wire(self._engine.models.changes.model(name))

    def _to_wire(self, info: ModelInfo) -> pb.Model:
        return convert.info_to_wire(with_public_failures(info, self._public))

    def _public(self, reason: str) -> str:
        status = self._status_of("/tandem.v1.Models/WatchModels", CheckpointCorrupt(reason))
        return status.message if status else ""


def _model_name(name: str) -> str:
    """Return `name`; raise InvalidName if it is not that of a model alone."""
    try:
        return check_name(name, "model")
    except InvalidName as error:
        raise InvalidName(str(error), field="name") from None


@contextmanager
def _unless_read_only() -> Iterator[None]:
    try:
        yield
    except VolumeReadOnly as error:
        raise VolumeReadOnly(
            "this server can't write the volume: change the alias where it can be written, with 'tandem models alias "
            "--local'"
        ) from error


def _images(messages: Iterable[pb.Image]) -> list[GivenImage]:
    return [GivenImage(each.name, _content(each), each.label) for each in messages]


def _content(message: pb.Image) -> bytes | RawImage:
    if message.WhichOneof("content") != "raw":
        return message.data
    return RawImage(message.raw.width, message.raw.height, message.raw.rgb)


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
        logit_bias=tuple(sorted(parameters.logit_bias.items())),
        num_alternatives=parameters.num_alternatives,
    )
