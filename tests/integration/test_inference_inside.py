"""A server in the test's own process, to see what its callers can't: the queue, the threads, the device."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from factories import png, publish_classifier, publish_language_model, write_image_dataset
from waiting import PATIENCE_S, held, until

from services.inference import compare_dataset as comparing
from services.inference.boundary import Boundary
from services.inference.classify import off_the_loop
from services.inference.decode_threads import DecodeThreads
from services.inference.engine import Engine
from services.inference.lanes import Priority
from services.inference.loading import ServedClassifier
from services.inference.server import Running, running_server
from services.inference.servicers import InferenceServicer
from tandem.client import AsyncClient, Comparison, ComparisonProgress, SamplingOptions
from tandem.data.manifest import read_index
from tandem.data.vocabulary import Vocabulary
from tandem.errors import DeadlineExceeded
from tandem.settings import Settings
from tandem.volume import Volume
from tandem.wire.limits import PRIORITY_KEY
from tandem.wire.oip import grpc_service_pb2 as oip
from tandem.wire.oip import grpc_service_pb2_grpc as rpc
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A server with a classifier `pictures`, a language model `words` and a dataset `shapes`."""
    volume = Volume(tmp_path)
    publish_classifier(volume, "pictures", "run-c")
    publish_language_model(volume, "words", "run-l")
    write_image_dataset(volume, "shapes", 70)
    settings = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(tmp_path), "TANDEM_DEVICE": "cpu"}
    # Whose network can be listened to.
    settings["TANDEM_ENGINE"] = "eager"
    async with running_server(Settings.from_environment(settings)) as running:
        yield running


async def passes_through(engine: Engine, reference: str) -> list[int]:
    """Return a list that gets the batch size of each pass through the network of a classifier."""
    served, sizes = await engine.models.get(reference), list[int]()
    assert isinstance(served, ServedClassifier)
    network: Any = cast(Any, served.runtime)._network
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    return sizes


async def test_a_call_whose_deadline_passes_in_the_queue_is_never_computed(running: Running) -> None:
    engine, opened = running.engine, threading.Event()
    sizes = await passes_through(engine, "pictures")
    holding = asyncio.create_task(engine.scheduler.run(lambda: opened.wait(60)))
    try:
        async with AsyncClient(running.address, timeout_s=0.3) as hasty:
            with pytest.raises(DeadlineExceeded):
                await hasty.classify("pictures", [png(0), png(1)])
        await until(lambda: engine.scheduler.num_items == 0)
    finally:
        opened.set()
    await holding
    async with AsyncClient(running.address) as patient:
        await patient.classify("pictures", [png(number) for number in range(5)])
    assert sizes == [5]


@dataclass
class Hasty:
    """A call whose deadline has just passed."""

    def time_remaining(self) -> float:
        return -0.001

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


async def test_the_deadline_of_a_call_reaches_the_queue(running: Running) -> None:
    sizes = await passes_through(running.engine, "pictures")
    request = pb.ClassifyRequest(model="pictures", images=[pb.Image(data=png(0))])
    with pytest.raises(DeadlineExceeded, match="deadline is in -"):
        await InferenceServicer(running.engine, Boundary("/").status).Classify(request, cast(Any, Hasty()))
    assert sizes == []


async def test_a_storm_of_cancelled_texts_leaves_nothing_behind(running: Running) -> None:
    async def leave(client: AsyncClient, seed: int) -> None:
        async for _ in client.generate("words", None, 100_000, SamplingOptions(seed=seed)):
            break

    async with AsyncClient(running.address) as client:
        await asyncio.gather(*(leave(client, seed) for seed in range(40)))
        await until(lambda: running.engine.scheduler.num_items == 0)
        answer = await asyncio.wait_for(client.classify("pictures", [png(0)]), 120)
    assert not answer.results[0].error


async def test_a_dataset_tells_how_far_it_is(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "PROGRESS_IMAGES", 32)
    monkeypatch.setattr(comparing, "PROGRESS_INTERVAL_S", 1000.0)
    async with AsyncClient(running.address) as client:
        *steps, answer = [step async for step in client.compare_dataset("pictures", "pictures", "shapes")]
    assert steps == [ComparisonProgress(done, 70) for done in (0, 32, 64)]
    assert isinstance(answer, Comparison)
    assert answer.summary.num_images == 70


async def test_images_are_decoded_by_the_priority_of_their_call(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, do = list[Priority](), DecodeThreads.do

    async def watched(self: DecodeThreads, work: Any, items: Any, group_size: int, priority: Priority) -> Any:
        seen.append(priority)
        return await do(self, work, items, group_size, priority)

    monkeypatch.setattr(DecodeThreads, "do", watched)
    images = [png(0), png(1)]
    infer = oip.ModelInferRequest(model_name="pictures")
    infer.inputs.add(name="image", datatype="BYTES", shape=[2]).contents.bytes_contents.extend(images)
    given = [pb.Image(data=image) for image in images]
    pair: dict[str, Any] = {"model_a": "pictures", "model_b": "pictures"}
    dataset = pb.CompareDatasetRequest(dataset="shapes", limit=2, num_returned_images=0, **pair)
    streamed = pb.ClassifyStreamRequest(request=pb.ClassifyRequest(model="pictures", images=given))
    async with grpc.aio.insecure_channel(running.address) as channel:
        ours: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        theirs: Any = rpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]

        async def classify_stream(**options: Any) -> None:
            assert [answer.error.code async for answer in ours.ClassifyStream(iter([streamed]), **options)] == [0]

        async def compare_dataset(**options: Any) -> None:
            assert [step async for step in ours.CompareDataset(dataset, **options)]

        for call in (
            partial(ours.Classify, streamed.request),
            classify_stream,
            partial(ours.Compare, pb.CompareRequest(images=given, **pair)),
            compare_dataset,
            partial(theirs.ModelInfer, infer),
        ):
            for name, priority in (("low", Priority.LOW), ("high", Priority.HIGH)):
                seen.clear()
                await call(metadata=((PRIORITY_KEY, name),), timeout=PATIENCE_S)
                assert set(seen) == {priority}, call


async def test_the_next_batch_is_decoded_while_the_device_computes(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = list[int](), running.engine.decoder.decode

    async def watched(sources: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        decoded.append(len(sources))
        return await decode(sources, *arguments, **options)

    monkeypatch.setattr(running.engine.decoder, "decode", watched)
    async with AsyncClient(running.address) as client:
        # Loaded before the device is held.
        await client.classify("pictures", [png(0)])
        decoded.clear()
        async with held(running.engine.scheduler):
            steps = client.compare_dataset("pictures", "pictures", "shapes")
            assert await anext(steps) == ComparisonProgress(0, 70)
            await until(lambda: running.engine.scheduler.num_waiting == 32 and decoded == [32, 32])
            await asyncio.sleep(0.05)
            assert decoded == [32, 32], "one batch ahead, no more"
        *_, answer = [step async for step in steps]
    assert isinstance(answer, Comparison)
    assert answer.summary.num_images == 70
    assert decoded == [32, 32, 6]


async def test_who_leaves_a_comparison_leaves_nothing_behind(running: Running) -> None:
    async with AsyncClient(running.address) as client:
        await client.classify("pictures", [png(0)])
        async with held(running.engine.scheduler):
            steps = client.compare_dataset("pictures", "pictures", "shapes", num_returned_images=10)
            await anext(steps)
            await until(lambda: running.engine.scheduler.num_waiting == 32)
            await steps.aclose()  # type: ignore[attr-defined]
            await until(lambda: running.engine.scheduler.num_items == running.engine.scheduler.num_waiting == 0)


@dataclass(frozen=True)
class WatchedVocabulary(Vocabulary):
    """Remembers the threads that encode."""

    threads: list[threading.Thread] = field(default_factory=list)

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        self.threads.append(threading.current_thread())
        return super().encode(text)


async def test_nothing_slow_runs_on_the_event_loop(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    served: Any = await running.engine.models.get("words")
    watched = WatchedVocabulary(served.vocabulary.tokens, served.vocabulary.tokenizer)
    object.__setattr__(served, "vocabulary", watched)
    threads = []

    def read(directory: Path, split: str) -> list[tuple[str, int]]:
        threads.append(threading.current_thread())
        return read_index(directory, split)

    monkeypatch.setattr(comparing, "read_index", read)
    async with AsyncClient(running.address) as client:
        assert [piece async for piece in client.generate("words", "the cat " * 100, 1)]
        assert [step async for step in client.compare_dataset("pictures", "pictures", "shapes", limit=2)]
    threads += watched.threads
    threads.append(await off_the_loop(100_000, threading.current_thread))
    assert len(threads) == 3
    assert threading.main_thread() not in threads
    # A hop costs more than a few answers do.
    assert await off_the_loop(5, threading.current_thread) is threading.main_thread()


async def test_many_answers_in_a_message(running: Running) -> None:
    async with AsyncClient(running.address) as client:
        images = [png(number % 5) for number in range(250)]
        classified = (await client.classify("pictures", images, 5)).results
        compared = (await client.compare("pictures", "pictures", images, 5)).results
    assert [result.top_k for result in classified] == [result.a for result in compared]
    assert len({result.top_k for result in classified}) == 5
