"""Typed clients of the inference service, blocking (`Client`) and asyncio (`AsyncClient`).

    with Client("127.0.0.1:8500") as client:
        answer = client.classify("digits", [Path("seven.png").read_bytes()])
        print(answer.results[0].top_k[0].words)

Every failure is a TandemError with one line. Images of any number go out in messages under the service's limits; the
version that answers the first message answers them all.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.access import OPEN, ClientAccess
from tandem.comparison.results import Comparison, ComparisonSummary, ModelVersion, PairResult, ScoredClass, Timings
from tandem.data.raw_image import RawImage
from tandem.errors import DeadlineExceeded
from tandem.model_calls import AsyncModelCalls, ModelCalls
from tandem.wire import convert
from tandem.wire.bulk import AsyncBulk, Bulk
from tandem.wire.channel import open_aio_channel, open_channel
from tandem.wire.handshakes import is_final, tls_problem
from tandem.wire.requests import (
    Collected,
    Image,
    Images,
    Received,
    SamplingOptions,
    classifying,
    comparing,
    dataset_request,
    generate_request,
    score_request,
)
from tandem.wire.results import (
    AliasMove,
    Classification,
    ComparisonProgress,
    Completion,
    GenerationSummary,
    ImageResult,
    LoadedModel,
    ModelChange,
    ModelDetails,
    ModelInfo,
    ModelsSnapshot,
    Scoring,
    ShadowReport,
    TextPiece,
    TextScore,
    TokenScore,
)
from tandem.wire.status import from_rpc_error
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

__all__ = [
    "AliasMove",
    "AsyncClient",
    "Classification",
    "Client",
    "ClientAccess",
    "Comparison",
    "ComparisonProgress",
    "ComparisonSummary",
    "Completion",
    "GenerationSummary",
    "Image",
    "ImageResult",
    "LoadedModel",
    "ModelChange",
    "ModelDetails",
    "ModelInfo",
    "ModelVersion",
    "ModelsSnapshot",
    "PairResult",
    "RawImage",
    "SamplingOptions",
    "ScoredClass",
    "Scoring",
    "ShadowReport",
    "TextPiece",
    "TextScore",
    "Timings",
    "TokenScore",
]

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 60.0
_SERVING = health_pb2.HealthCheckResponse.SERVING


class Client(ModelCalls):
    """A blocking client; safe to share between threads. `timeout_s` is the deadline of a call without a stream.

    `access` names the files of TLS and of the token, which are read once, here; `Settings.from_environment()` has that
    of the environment. `priority` is that of all its calls: "low", "normal" or "high"; empty for the server's default.
    Raises InvalidRequest for what is wrong with them.
    """

    def __init__(
        self, address: str, timeout_s: float = DEFAULT_TIMEOUT_S, access: ClientAccess = OPEN, priority: str = ""
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._channel = open_channel(address, access, priority)
        self._is_encrypted = access.is_encrypted
        self._errors = partial(_errors, address, access.is_encrypted)
        self._inference = rpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._models = rpc.ModelsStub(self._channel)  # type: ignore[no-untyped-call]
        # Its stub for types lacks Watch.
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def classify(self, model: str, images: Images, top_k: int = 0) -> Classification:
        """Return the `top_k` (0: 5) classes of each image; an image that can't be decoded has an error instead."""
        received = Received("images")
        with self._errors(received):
            return self._ask(self._inference.Classify, classifying(model, images, top_k, received))

    def classify_stream(self, model: str, images: Images, top_k: int = 0) -> Generator[Classification, None, None]:
        """Yield answers for the images as they come, a batch each, in the order of the images.

        For any number of images in bounded memory: they are read, in another thread, no faster than they are answered.
        The version that answers first answers all. Leaving the loop stops the server's work.
        """
        received = Received("images")
        bulk = Bulk(model, images, top_k, received)
        with self._errors(received):
            call = self._inference.ClassifyStream(bulk.requests())
            try:
                for message in call:
                    yield bulk.take(message)
            finally:
                bulk.leave()
                call.cancel()
        bulk.finish()

    def compare(self, model_a: str, model_b: str, images: Images, top_k: int = 0) -> Comparison:
        """Return what two classifiers say of each image, and the summary over all."""
        received = Received("images")
        with self._errors(received):
            return self._ask(self._inference.Compare, comparing(model_a, model_b, images, top_k, received))

    def _ask(self, call: Callable[..., Any], requests: Generator[Any, Any, T]) -> T:
        """Call with each of `requests`, hand them the answers, and return what they return."""
        answer = None
        while True:
            try:
                request = requests.send(answer)
            except StopIteration as end:
                value: T = end.value
                return value
            answer = call(request, timeout=self.timeout_s)

    def compare_dataset(
        self,
        model_a: str,
        model_b: str,
        dataset: str,
        split: str = "val",
        top_k: int = 0,
        limit: int = 0,
        num_returned_images: int = 0,
    ) -> Iterator[ComparisonProgress | Comparison]:
        """Compare on a split of a dataset of the server's volume: progress, and last the Comparison.

        Its results are the images that the two name differently and those that could not be read.
        `num_returned_images` of the former, those furthest apart, come along as its `images`.
        """
        request = dataset_request(model_a, model_b, dataset, split, top_k, limit, num_returned_images)
        received = Received("images")
        with self._errors(received):
            call = self._inference.CompareDataset(request)
            collected = Collected(received)
            try:
                for message in call:
                    yield collected.take(message)
            finally:
                call.cancel()

    def generate(
        self,
        model: str,
        prompt: str | None = None,
        max_words: int = 0,
        sampling: SamplingOptions | None = None,
        num_texts: int = 0,
    ) -> Iterator[TextPiece | GenerationSummary]:
        """Yield the text as it is drawn, then the summary; leaving the loop stops the server's work.

        Of several texts the pieces come interleaved, and each has a summary: `text_index` says whose it is.
        """
        request = generate_request(model, prompt, max_words, sampling or SamplingOptions(), num_texts)
        received = Received("words")
        with self._errors(received):
            call = self._inference.Generate(request)
            try:
                for message in call:
                    received.count += len(message.words)
                    yield convert.generation_from_wire(message)
            finally:
                call.cancel()

    def complete(
        self, model: str, prompt: str | None = None, max_words: int = 0, sampling: SamplingOptions | None = None
    ) -> Completion:
        """Return the text that `generate` yields, once it is whole; a long one needs a long `timeout_s`."""
        return self.complete_several(1, model, prompt, max_words, sampling)[0]

    def complete_several(
        self,
        num_texts: int,
        model: str,
        prompt: str | None = None,
        max_words: int = 0,
        sampling: SamplingOptions | None = None,
    ) -> tuple[Completion, ...]:
        """Return `num_texts` texts that go on from the same prompt, each with the next seed."""
        request = generate_request(model, prompt, max_words, sampling or SamplingOptions(), num_texts)
        with self._errors():
            return convert.completions_from_wire(self._inference.Complete(request, timeout=self.timeout_s))

    def score(
        self, model: str, texts: str | Sequence[str], num_alternatives: int = 0, first_is_given: bool = False
    ) -> Scoring:
        """Return the log-probability of each token of one text or several, and perplexity.

        A text begins after an end of line, or, with `first_is_given`, with a token that is not scored itself.
        """
        request = score_request(model, texts, num_alternatives, first_is_given)
        with self._errors():
            return convert.scoring_from_wire(self._inference.Score(request, timeout=self.timeout_s))

    def list_models(self) -> list[ModelInfo]:
        """Return every model of the registry."""
        with self._errors():
            message = self._models.ListModels(pb.ListModelsRequest(), timeout=self.timeout_s)
        return [convert.info_from_wire(each) for each in message.models]

    def get_model(self, reference: str) -> ModelDetails:
        """Return what is known of one version."""
        with self._errors():
            message = self._models.GetModel(pb.GetModelRequest(model=reference), timeout=self.timeout_s)
        return convert.details_from_wire(message)

    def wait_until_serving(self, model: str = "", timeout_s: float = 30.0) -> None:
        """Wait until model `model` (its name; empty: the server) answers; raise DeadlineExceeded, or why it can't."""
        deadline, problem = time.monotonic() + timeout_s, ""
        while (remaining_s := deadline - time.monotonic()) > 0:
            # Not wait_for_ready, which would hide why a handshake fails until the time is over.
            call = self._health.Watch(_health_request(model), timeout=remaining_s)
            try:
                if any(message.status == _SERVING for message in call):
                    return
            except grpc.RpcError as error:
                problem = _raise_unless_lost(error, self.address, self._is_encrypted)
            finally:
                call.cancel()
            time.sleep(0.05)
        raise _not_serving(model, self.address, timeout_s, problem)


class AsyncClient(AsyncModelCalls):
    """The same for asyncio; to be used on the event loop that it was made on."""

    def __init__(
        self, address: str, timeout_s: float = DEFAULT_TIMEOUT_S, access: ClientAccess = OPEN, priority: str = ""
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._channel = open_aio_channel(address, access, priority)
        self._is_encrypted = access.is_encrypted
        self._errors = partial(_errors, address, access.is_encrypted)
        # The generated stubs take either kind of channel; their types know only the blocking one.
        self._inference: Any = rpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._models: Any = rpc.ModelsStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def classify(self, model: str, images: Images, top_k: int = 0) -> Classification:
        """See Client.classify."""
        received = Received("images")
        with self._errors(received):
            return await self._ask(self._inference.Classify, classifying(model, images, top_k, received))

    async def classify_stream(self, model: str, images: Images, top_k: int = 0) -> AsyncGenerator[Classification, None]:
        """See Client.classify_stream; the images are read on the event loop."""
        received = Received("images")
        bulk = AsyncBulk(model, images, top_k, received)
        with self._errors(received):
            call = self._inference.ClassifyStream(bulk.requests())
            try:
                async for message in call:
                    yield bulk.take(message)
            finally:
                call.cancel()
        bulk.finish()

    async def compare(self, model_a: str, model_b: str, images: Images, top_k: int = 0) -> Comparison:
        """See Client.compare."""
        received = Received("images")
        with self._errors(received):
            return await self._ask(self._inference.Compare, comparing(model_a, model_b, images, top_k, received))

    async def _ask(self, call: Callable[..., Any], requests: Generator[Any, Any, T]) -> T:
        """See Client._ask."""
        answer = None
        while True:
            try:
                request = requests.send(answer)
            except StopIteration as end:
                value: T = end.value
                return value
            answer = await call(request, timeout=self.timeout_s)

    async def compare_dataset(
        self,
        model_a: str,
        model_b: str,
        dataset: str,
        split: str = "val",
        top_k: int = 0,
        limit: int = 0,
        num_returned_images: int = 0,
    ) -> AsyncIterator[ComparisonProgress | Comparison]:
        """See Client.compare_dataset."""
        request = dataset_request(model_a, model_b, dataset, split, top_k, limit, num_returned_images)
        received = Received("images")
        with self._errors(received):
            call = self._inference.CompareDataset(request)
            collected = Collected(received)
            try:
                async for message in call:
                    yield collected.take(message)
            finally:
                call.cancel()

    async def generate(
        self,
        model: str,
        prompt: str | None = None,
        max_words: int = 0,
        sampling: SamplingOptions | None = None,
        num_texts: int = 0,
    ) -> AsyncIterator[TextPiece | GenerationSummary]:
        """See Client.generate."""
        request = generate_request(model, prompt, max_words, sampling or SamplingOptions(), num_texts)
        received = Received("words")
        with self._errors(received):
            call = self._inference.Generate(request)
            try:
                async for message in call:
                    received.count += len(message.words)
                    yield convert.generation_from_wire(message)
            finally:
                call.cancel()

    async def complete(
        self, model: str, prompt: str | None = None, max_words: int = 0, sampling: SamplingOptions | None = None
    ) -> Completion:
        """See Client.complete."""
        return (await self.complete_several(1, model, prompt, max_words, sampling))[0]

    async def complete_several(
        self,
        num_texts: int,
        model: str,
        prompt: str | None = None,
        max_words: int = 0,
        sampling: SamplingOptions | None = None,
    ) -> tuple[Completion, ...]:
        """See Client.complete_several."""
        request = generate_request(model, prompt, max_words, sampling or SamplingOptions(), num_texts)
        with self._errors():
            return convert.completions_from_wire(await self._inference.Complete(request, timeout=self.timeout_s))

    async def score(
        self, model: str, texts: str | Sequence[str], num_alternatives: int = 0, first_is_given: bool = False
    ) -> Scoring:
        """See Client.score."""
        request = score_request(model, texts, num_alternatives, first_is_given)
        with self._errors():
            return convert.scoring_from_wire(await self._inference.Score(request, timeout=self.timeout_s))

    async def list_models(self) -> list[ModelInfo]:
        """See Client.list_models."""
        with self._errors():
            message = await self._models.ListModels(pb.ListModelsRequest(), timeout=self.timeout_s)
        return [convert.info_from_wire(each) for each in message.models]

    async def get_model(self, reference: str) -> ModelDetails:
        """See Client.get_model."""
        with self._errors():
            message = await self._models.GetModel(pb.GetModelRequest(model=reference), timeout=self.timeout_s)
        return convert.details_from_wire(message)

    async def wait_until_serving(self, model: str = "", timeout_s: float = 30.0) -> None:
        """See Client.wait_until_serving."""
        deadline, problem = time.monotonic() + timeout_s, ""
        while (remaining_s := deadline - time.monotonic()) > 0:
            # Not wait_for_ready, which would hide why a handshake fails until the time is over.
            call = self._health.Watch(_health_request(model), timeout=remaining_s)
            try:
                async for message in call:
                    if message.status == _SERVING:
                        return
            except grpc.RpcError as error:
                problem = _raise_unless_lost(error, self.address, self._is_encrypted)
            finally:
                call.cancel()
            await asyncio.sleep(0.05)
        raise _not_serving(model, self.address, timeout_s, problem)


@contextmanager
def _errors(address: str, is_encrypted: bool, received: Received | None = None) -> Iterator[None]:
    """Turn what gRPC raises into what the server raised; `received` is what had been answered by then."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, address, str(received or ""), is_encrypted) from None


def _raise_unless_lost(error: Any, address: str, is_encrypted: bool) -> str:
    """Raise what stands for `error`, or return what it says of TLS where it may pass: lost connection, end of wait."""
    may_pass = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    if not may_pass or is_final(error.details() or ""):
        raise from_rpc_error(error, address, is_encrypted=is_encrypted) from None
    return tls_problem(error.details() or "", address, is_encrypted)


def _not_serving(model: str, address: str, timeout_s: float, problem: str) -> DeadlineExceeded:
    what = f"model {model!r} is not served" if model else "no inference server answers"
    return DeadlineExceeded(f"{what} at {address} after {timeout_s:g} s" + (f": {problem}" if problem else ""))


def _health_request(model: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=f"models/{model}" if model else "")
