"""Typed clients of the inference service, blocking (`Client`) and asyncio (`AsyncClient`).

    with Client("127.0.0.1:8500") as client:
        answer = client.classify("digits", [Path("seven.png").read_bytes()])
        print(answer.results[0].top_k[0].words)

Every failure is a TandemError with one line. Images of any number go out in messages under the service's limits; the
version that answers the first message answers them all.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.comparison.results import Comparison, ComparisonSummary, ModelVersion, PairResult, ScoredClass, Timings
from tandem.errors import DeadlineExceeded
from tandem.wire import convert
from tandem.wire.limits import CHANNEL_OPTIONS
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
)
from tandem.wire.results import (
    Classification,
    ComparisonProgress,
    GenerationSummary,
    ImageResult,
    ModelDetails,
    ModelInfo,
    TextPiece,
)
from tandem.wire.status import from_rpc_error
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

__all__ = [
    "AsyncClient",
    "Classification",
    "Client",
    "Comparison",
    "ComparisonProgress",
    "ComparisonSummary",
    "GenerationSummary",
    "Image",
    "ImageResult",
    "ModelDetails",
    "ModelInfo",
    "ModelVersion",
    "PairResult",
    "SamplingOptions",
    "ScoredClass",
    "TextPiece",
    "Timings",
]

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 60.0
_OPTIONS = (
    *CHANNEL_OPTIONS,
    # A server that was just started must not be waited for in steps of 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A proxy meant for the web must not come between.
    ("grpc.enable_http_proxy", 0),
)
_SERVING = health_pb2.HealthCheckResponse.SERVING


class Client:
    """A blocking client; safe to share between threads. `timeout_s` is the deadline of a call without a stream."""

    def __init__(self, address: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
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
        with _errors(self.address, received):
            return self._ask(self._inference.Classify, classifying(model, images, top_k, received))

    def compare(self, model_a: str, model_b: str, images: Images, top_k: int = 0) -> Comparison:
        """Return what two classifiers say of each image, and the summary over all."""
        received = Received("images")
        with _errors(self.address, received):
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
        self, model_a: str, model_b: str, dataset: str, split: str = "val", top_k: int = 0, limit: int = 0
    ) -> Iterator[ComparisonProgress | Comparison]:
        """Compare on a split of a dataset of the server's volume: progress, and last the Comparison.

        Its results are the images that the two name differently and those that could not be read.
        """
        request, received = dataset_request(model_a, model_b, dataset, split, top_k, limit), Received("images")
        with _errors(self.address, received):
            call = self._inference.CompareDataset(request)
            collected = Collected(received)
            try:
                for message in call:
                    yield collected.take(message)
            finally:
                call.cancel()

    def generate(
        self, model: str, prompt: str | None = None, max_words: int = 0, sampling: SamplingOptions | None = None
    ) -> Iterator[TextPiece | GenerationSummary]:
        """Yield the text as it is drawn, then the summary; leaving the loop stops the server's work."""
        request, received = generate_request(model, prompt, max_words, sampling or SamplingOptions()), Received("words")
        with _errors(self.address, received):
            call = self._inference.Generate(request)
            try:
                for message in call:
                    received.count += len(message.words)
                    yield convert.generation_from_wire(message)
            finally:
                call.cancel()

    def list_models(self) -> list[ModelInfo]:
        """Return every model of the registry."""
        with _errors(self.address):
            message = self._models.ListModels(pb.ListModelsRequest(), timeout=self.timeout_s)
        return [convert.info_from_wire(each) for each in message.models]

    def get_model(self, reference: str) -> ModelDetails:
        """Return what is known of one version."""
        with _errors(self.address):
            message = self._models.GetModel(pb.GetModelRequest(model=reference), timeout=self.timeout_s)
        return convert.details_from_wire(message)

    def wait_until_serving(self, model: str = "", timeout_s: float = 30.0) -> None:
        """Wait until model `model` (its name; empty: the server) answers; raise DeadlineExceeded, or why it can't."""
        deadline = time.monotonic() + timeout_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            call = self._health.Watch(_health_request(model), timeout=remaining_s, wait_for_ready=True)
            try:
                if any(message.status == _SERVING for message in call):
                    return
            except grpc.RpcError as error:
                _raise_unless_lost(error, self.address)
            finally:
                call.cancel()
            time.sleep(0.05)
        raise _not_serving(model, self.address, timeout_s)


class AsyncClient:
    """The same for asyncio; to be used on the event loop that it was made on."""

    def __init__(self, address: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
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
        with _errors(self.address, received):
            return await self._ask(self._inference.Classify, classifying(model, images, top_k, received))

    async def compare(self, model_a: str, model_b: str, images: Images, top_k: int = 0) -> Comparison:
        """See Client.compare."""
        received = Received("images")
        with _errors(self.address, received):
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
        self, model_a: str, model_b: str, dataset: str, split: str = "val", top_k: int = 0, limit: int = 0
    ) -> AsyncIterator[ComparisonProgress | Comparison]:
        """See Client.compare_dataset."""
        request, received = dataset_request(model_a, model_b, dataset, split, top_k, limit), Received("images")
        with _errors(self.address, received):
            call = self._inference.CompareDataset(request)
            collected = Collected(received)
            try:
                async for message in call:
                    yield collected.take(message)
            finally:
                call.cancel()

    async def generate(
        self, model: str, prompt: str | None = None, max_words: int = 0, sampling: SamplingOptions | None = None
    ) -> AsyncIterator[TextPiece | GenerationSummary]:
        """See Client.generate."""
        request, received = generate_request(model, prompt, max_words, sampling or SamplingOptions()), Received("words")
        with _errors(self.address, received):
            call = self._inference.Generate(request)
            try:
                async for message in call:
                    received.count += len(message.words)
                    yield convert.generation_from_wire(message)
            finally:
                call.cancel()

    async def list_models(self) -> list[ModelInfo]:
        """See Client.list_models."""
        with _errors(self.address):
            message = await self._models.ListModels(pb.ListModelsRequest(), timeout=self.timeout_s)
        return [convert.info_from_wire(each) for each in message.models]

    async def get_model(self, reference: str) -> ModelDetails:
        """See Client.get_model."""
        with _errors(self.address):
            message = await self._models.GetModel(pb.GetModelRequest(model=reference), timeout=self.timeout_s)
        return convert.details_from_wire(message)

    async def wait_until_serving(self, model: str = "", timeout_s: float = 30.0) -> None:
        """See Client.wait_until_serving."""
        deadline = time.monotonic() + timeout_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            call = self._health.Watch(_health_request(model), timeout=remaining_s, wait_for_ready=True)
            try:
                async for message in call:
                    if message.status == _SERVING:
                        return
            except grpc.RpcError as error:
                _raise_unless_lost(error, self.address)
            finally:
                call.cancel()
            await asyncio.sleep(0.05)
        raise _not_serving(model, self.address, timeout_s)


@contextmanager
def _errors(address: str, received: Received | None = None) -> Iterator[None]:
    """Turn what gRPC raises into what the server raised; `received` is what had been answered by then."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, address, str(received or "")) from None


def _raise_unless_lost(error: Any, address: str) -> None:
    """Raise what stands for `error`, unless it may pass: a lost connection, or the end of the wait."""
    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise from_rpc_error(error, address) from None


def _not_serving(model: str, address: str, timeout_s: float) -> DeadlineExceeded:
    what = f"model {model!r} is not served" if model else "no inference server answers"
    return DeadlineExceeded(f"{what} at {address} after {timeout_s:g} s")


def _health_request(model: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=f"models/{model}" if model else "")
