"""Guarantee 6, over gRPC: overload is refused with a hint, deadlines and cancellation are honoured, models share."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from factories import CLASS_IDS, png, publish_classifier, publish_language_model
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from torch import Tensor
from waiting import held, until

from services.inference.admission import Limits
from services.inference.loading import ServedClassifier
from services.inference.scheduler import MAX_BATCH
from services.inference.server import Running, running_server
from tandem.client import AsyncClient, SamplingOptions, TextPiece
from tandem.errors import DeadlineExceeded, LimitExceeded, QueueFull, TandemError
from tandem.settings import Settings
from tandem.volume import Volume
from tandem.wire import limits
from tandem.wire.status import DETAILS_KEY, PUSHBACK_KEY, from_rpc_error
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A server with classifiers `a` and `b`, loaded, and a language model `words`."""
    volume = Volume(tmp_path)
    publish_classifier(volume, "a", "run-a", seed=12)
    publish_classifier(volume, "b", "run-b", seed=13, classes=CLASS_IDS[::-1])
    publish_language_model(volume, "words", "run-l")
    settings = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(tmp_path), "TANDEM_DEVICE": "cpu"}
    async with running_server(Settings.from_environment(settings)) as running:
        for name in ("a", "b", "words"):
            await running.engine.models.get(name)
        yield running


@pytest.fixture
async def stub(running: Running) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(running.address) as channel:
        yield rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
async def client(running: Running) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(running.address) as client:
        yield client


async def passes_through(running: Running, reference: str) -> list[int]:
    """Return a list that gets the size of each batch that a classifier is given."""
    served, sizes = await running.engine.models.get(reference), list[int]()
    assert isinstance(served, ServedClassifier)
    assert served.joins
    runtime: Any = served.runtime

    def counted(predict: Any, pixels: Tensor) -> Any:
        sizes.append(len(pixels))
        return predict(pixels)

    for way in ("predict", "predict_beside"):
        if hasattr(runtime, way):
            setattr(runtime, way, partial(counted, getattr(runtime, way)))
    return sizes


def request(*numbers: int, model: str = "a") -> pb.ClassifyRequest:
    return pb.ClassifyRequest(model=model, images=[pb.Image(data=png(number)) for number in numbers])


async def test_overload_is_refused_with_a_hint_and_what_was_let_in_is_answered(running: Running, stub: Any) -> None:
    scheduler = running.engine.scheduler
    full = limits.MAX_MODEL_ITEMS // limits.MAX_IMAGES
    few = (await stub.Classify(request(*range(7)))).results
    large = request(*(number % 7 for number in range(limits.MAX_IMAGES)))
    async with held(scheduler):
        inside = [asyncio.ensure_future(stub.Classify(large)) for _ in range(full)]
        await until(lambda: scheduler.num_items == limits.MAX_MODEL_ITEMS)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Classify(request(0))
        # The other model has room left.
        other = asyncio.ensure_future(stub.Classify(request(1, model="b")))
        await until(lambda: scheduler.num_items == limits.MAX_MODEL_ITEMS + 1)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(caught.value.trailing_metadata() or ())
    retry, rich = error_details_pb2.RetryInfo(), status_pb2.Status.FromString(metadata[DETAILS_KEY])
    assert any(detail.Unpack(retry) for detail in rich.details)
    pushback_ms = int(cast(str, metadata[PUSHBACK_KEY]))
    assert pushback_ms == pytest.approx(retry.retry_delay.ToMilliseconds(), abs=1)
    assert pushback_ms >= 50
    error = from_rpc_error(caught.value, running.address)
    assert isinstance(error, QueueFull)
    assert "3072 of 3072 items" in str(error)
    for answer in await asyncio.gather(*inside):
        assert [result.top_k for result in answer.results] == [few[number % 7].top_k for number in range(1024)]
    assert len((await other).results) == 1
    await until(lambda: scheduler.num_items == 0)


async def test_bytes_and_streams_are_bounded(running: Running, client: AsyncClient) -> None:
    scheduler = running.engine.scheduler
    scheduler._room.limits = Limits(num_bytes=40_000, streams=2)
    async with held(scheduler):
        first = asyncio.create_task(client.classify("a", [png(number) for number in range(8)]))
        await until(lambda: scheduler.num_items == 8)
        with pytest.raises(LimitExceeded, match="of 40000 bytes"):
            await client.classify("a", [png(number) for number in range(8)])
    assert len((await first).results) == 8
    texts = [client.generate("words", None, 100_000, SamplingOptions(seed=seed)) for seed in range(2)]
    for text in texts:
        assert isinstance(await anext(text), TextPiece)
    with pytest.raises(LimitExceeded, match="2 of 2 streams"):
        await anext(client.generate("words", None, 1))
    for text in texts:
        await text.aclose()  # type: ignore[attr-defined]
    await until(lambda: scheduler.num_items == 0)
    assert [piece async for piece in client.generate("words", None, 1)]


async def test_calls_without_the_time_for_an_answer_cost_no_work(running: Running, client: AsyncClient) -> None:
    sizes = await passes_through(running, "a")
    async with AsyncClient(running.address, timeout_s=0.001) as hasty, held(running.engine.scheduler):
        calls = [hasty.classify("a", [png(number % 9)]) for number in range(100)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, DeadlineExceeded) for answer in answers)
        await until(lambda: running.engine.scheduler.num_items == 0)
    assert sizes == []
    assert not (await client.classify("a", [png(0)])).results[0].error


async def test_at_once_is_refused_what_the_queue_leaves_no_time_for(running: Running, client: AsyncClient) -> None:
    engine = running.engine
    for size in (1, 32, 8, 16):
        await client.classify("a", [png(number) for number in range(size)])
    served = await engine.models.get("a")
    assert isinstance(served, ServedClassifier)
    scheduler = engine.scheduler
    images = [png(number % 5) for number in range(1024)]
    async with held(scheduler):
        waiting = [asyncio.create_task(client.classify("a", images)) for _ in range(2)]
        await until(lambda: scheduler.num_waiting >= 512)
        needed_s = scheduler._backlog.all_s(time.monotonic())
        async with AsyncClient(running.address, timeout_s=0.7 * needed_s) as hasty:
            with pytest.raises(DeadlineExceeded, match=r"the answer would take about .* ms, and the deadline is in"):
                await hasty.classify("a", [png(0)])
    assert len(await asyncio.gather(*waiting)) == 2


async def test_a_storm_of_cancelled_calls_leaves_it_empty_and_serving(
    running: Running, stub: Any, client: AsyncClient, tried: "Counter[str]"
) -> None:
    chance = random.Random(3)
    alone = [(await client.classify("a", [png(number)])).results[0].top_k for number in range(8)]
    codes: list[grpc.StatusCode] = []
    right: list[bool] = []

    async def leave(number: int) -> None:
        await asyncio.sleep(chance.random() * 2)
        call = stub.Classify(request(number % 8, model=("a", "b")[number % 2]))
        asyncio.get_running_loop().call_later(chance.random() * 0.03, call.cancel)
        codes.append(await call.code())

    async def stay(number: int) -> None:
        await asyncio.sleep(chance.random() * 2)
        right.append((await client.classify("a", [png(number % 8)])).results[0].top_k == alone[number % 8])

    await asyncio.gather(*(leave(number) for number in range(1000)), *(stay(number) for number in range(40)))
    # Some are answered before they are cancelled; nothing else happens to any.
    assert set(codes) <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.OK}
    assert codes.count(grpc.StatusCode.CANCELLED) > 100
    tried["call cancelled at a random moment"] += len(codes)
    assert right == [True] * 40
    await until(lambda: running.engine.scheduler.num_items == 0)
    assert running.engine.scheduler.num_waiting == 0
    assert running.engine.scheduler._room.num_bytes == 0
    lanes = list(running.engine.scheduler._lanes.values())
    assert [(lane.num_admitted, lane.num_announced) for lane in lanes] == [(0, 0)] * len(lanes)


async def words(client: AsyncClient, sampling: SamplingOptions) -> list[str]:
    pieces = client.generate("words", "the cat", 200, sampling)
    drawn = [word async for piece in pieces if isinstance(piece, TextPiece) for word in piece.words]
    assert len(drawn) == 200
    return drawn


async def test_models_mixed_at_random_answer_as_they_do_alone(running: Running, client: AsyncClient) -> None:
    chance, sampling = random.Random(5), SamplingOptions(seed=4)
    alone = {
        (model, number): (await client.classify(model, [png(number)])).results[0].top_k
        for model in ("a", "b")
        for number in range(10)
    }
    pair = (await client.compare("a", "b", [png(number) for number in range(10)])).results
    text = await words(client, sampling)
    sizes = await passes_through(running, "a")

    async def classify(model: str) -> None:
        await asyncio.sleep(chance.random())
        numbers = chance.choices(range(10), k=chance.choice((1, 1, 1, 3, 40)))
        results = (await client.classify(model, [*(png(number) for number in numbers), b"broken"])).results
        assert [result.top_k for result in results[:-1]] == [alone[model, number] for number in numbers]
        assert results[-1].error

    async def compare() -> None:
        await asyncio.sleep(chance.random())
        assert (await client.compare("a", "b", [png(number) for number in range(10)])).results == pair

    async def generate() -> None:
        assert await words(client, sampling) == text

    calls = [classify(chance.choice("ab")) for _ in range(60)] + [compare() for _ in range(6)]
    await asyncio.gather(generate(), *calls)
    # How many sizes there are is chance.
    assert len(set(sizes)) > 1
    assert max(sizes) <= MAX_BATCH


async def test_single_images_that_wait_together_share_a_batch(running: Running, client: AsyncClient) -> None:
    sizes = await passes_through(running, "a")
    async with held(running.engine.scheduler):
        calls = [asyncio.create_task(client.classify("a", [png(number % 5)])) for number in range(40)]
        await until(lambda: running.engine.scheduler.num_waiting == 40)
    answers = await asyncio.gather(*calls)
    # A full batch, or its halves beside each other, and what is left.
    assert sum(sizes) == 40
    assert len(sizes) <= 4
    assert all(answer.results == answers[number % 5].results for number, answer in enumerate(answers))


async def test_the_priority_of_a_call_is_in_its_metadata(running: Running, stub: Any) -> None:
    order: list[str] = []

    async def call(priority: str, model: str) -> None:
        await stub.Classify(request(0, model=model), metadata=((limits.PRIORITY_KEY, priority),))
        order.append(priority)

    async with held(running.engine.scheduler):
        calls = []
        for priority, model in (("low", "a"), ("normal", "b"), ("high", "a")):
            # One after the other, or their order in the queue would be open.
            calls.append(asyncio.create_task(call(priority, model)))
            await until(lambda: running.engine.scheduler.num_waiting == len(calls))
    await asyncio.gather(*calls)
    assert order.index("high") < order.index("normal")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Classify(request(0), metadata=((limits.PRIORITY_KEY, "urgent"),))
    error: TandemError = from_rpc_error(caught.value, running.address)
    assert str(error) == "tandem-priority is 'urgent'; it is low, normal or high"
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_the_limits_are_in_the_metadata_of_the_models_service(running: Running) -> None:
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub: Any = rpc.ModelsStub(channel)  # type: ignore[no-untyped-call]
        for call in (stub.ListModels(pb.ListModelsRequest()), stub.GetModel(pb.GetModelRequest(model="a"))):
            published = dict(await call.initial_metadata())
            await call
            assert published["tandem-limit-images-per-message"] == "1024"
            assert published["tandem-limit-queue-items"] == str(running.engine.scheduler._room.limits.items)
            assert published["tandem-limit-streams"] == str(limits.MAX_STREAMS)
