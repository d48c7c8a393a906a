"""ClassifyStream: bulk work in order, bounded, with errors that stay with their requests."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from factories import png
from google.rpc import code_pb2, error_details_pb2  # type: ignore[import-untyped]
from inference_server import ServerProcess
from waiting import until

from services.inference.classify_stream import classify_stream, weight
from services.inference.server import running_server
from tandem.client import AsyncClient, Client
from tandem.errors import InvalidImage, InvalidRequest, ModelNotFound
from tandem.settings import Settings
from tandem.wire.limits import MAX_STREAM_IMAGES
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

pytest_plugins = ["inference_fixtures"]


def request(name: str, model: str = "a", num_images: int = 1, top_k: int = 2) -> pb.ClassifyStreamRequest:
    images = [pb.Image(data=png(number), name=f"{name}-{number}") for number in range(num_images)]
    return pb.ClassifyStreamRequest(id=name, request=pb.ClassifyRequest(model=model, images=images, top_k=top_k))


def test_answers_come_in_order_and_errors_stay_with_their_requests(server: ServerProcess) -> None:
    requests = [
        request("first"),
        request("unknown", model="nope"),
        request("too many", num_images=1025),
        request("text", model="LSTM"),
        request("few", top_k=-1),
        request("last", num_images=3),
        pb.ClassifyStreamRequest(id="empty"),
    ]
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        answers = list(stub.ClassifyStream(iter(requests)))
    assert [answer.id for answer in answers] == [each.id for each in requests]
    assert [answer.WhichOneof("outcome") for answer in answers] == [
        *("response", "error", "error", "error", "error", "response", "error")
    ]
    assert [result.name for result in answers[5].response.results] == ["last-0", "last-1", "last-2"]
    assert answers[0].response.model.version == 1
    assert answers[0].response.timings.compute_ms > 0
    assert [code_pb2.Code.Name(answers[place].error.code) for place in (1, 2, 3, 4)] == [
        *("NOT_FOUND", "INVALID_ARGUMENT", "INVALID_ARGUMENT", "INVALID_ARGUMENT")
    ]
    fields = []
    for place in (2, 3, 4, 6):
        wrong = error_details_pb2.BadRequest()
        assert any(detail.Unpack(wrong) for detail in answers[place].error.details)
        fields.append(wrong.field_violations[0].field)
    assert fields == ["images", "model", "top_k", "images"]


def test_a_message_that_is_no_request_ends_the_stream(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        send: Any = channel.stream_stream("/tandem.v1.Inference/ClassifyStream")
        answers = send(iter([request("first").SerializeToString(), b"\xff", request("last").SerializeToString()]))
        assert pb.ClassifyStreamResponse.FromString(next(answers)).id == "first"
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    error: Any = caught.value
    assert (error.code(), error.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the message is no request of tandem.v1.Inference/ClassifyStream",
    )


def test_the_client_answers_as_classify_does(client: Client) -> None:
    images = [(f"{number}.png", png(number) if number != 40 else b"junk") for number in range(70)]
    answers = list(client.classify_stream("three", images, 2))
    assert [len(answer.results) for answer in answers] == [32, 32, 6]
    assert {answer.model.label for answer in answers} == {"three:2"}
    whole = client.classify("three", images, 2)
    assert tuple(result for answer in answers for result in answer.results) == whole.results


async def test_the_asyncio_client_does_too(server: ServerProcess, client: Client) -> None:
    images = [png(number) for number in range(40)]
    async with AsyncClient(server.address) as other:
        found = [result async for answer in other.classify_stream("a", images) for result in answer.results]
        with pytest.raises(ModelNotFound):
            await anext(other.classify_stream("nope", images))
        async for _ in other.classify_stream("a", images):
            break
    assert tuple(found) == client.classify("a", images).results


def test_errors_of_the_client(client: Client) -> None:
    with pytest.raises(ModelNotFound):
        list(client.classify_stream("nope", [png(0)]))
    with pytest.raises(InvalidRequest, match="no images"):
        list(client.classify_stream("a", []))

    def images() -> Iterator[bytes]:
        yield from (png(number) for number in range(40))
        raise InvalidImage("this one can't be read")

    answered: list[int] = []

    def read() -> None:
        for answer in client.classify_stream("a", images()):
            answered.append(len(answer.results))

    with pytest.raises(InvalidImage, match="can't be read"):
        read()
    assert answered == [32]


def test_a_request_weighs_its_images_or_its_bytes() -> None:
    assert weight(request("few", num_images=3)) == 3
    large = pb.ClassifyRequest(images=[pb.Image(data=bytes(64 * 1024 * 1024))])
    assert weight(pb.ClassifyStreamRequest(request=large)) == MAX_STREAM_IMAGES


@pytest.fixture
def settings(server: ServerProcess) -> Settings:
    home = str(server.volume.home)
    environment = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": home, "TANDEM_DEVICE": "cpu"}
    return Settings.from_environment({**environment, "TANDEM_ENGINE": "eager"})


async def test_a_caller_who_leaves_frees_the_queue(settings: Settings) -> None:
    held = threading.Event()
    async with running_server(settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        await running.engine.models.get("a")
        blocked = asyncio.create_task(running.engine.scheduler.run(held.wait))
        stub: Any = rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.ClassifyStream(iter([request(str(number), num_images=8) for number in range(200)]))
        try:
            # 256 images are in work, and nothing more is read.
            await until(lambda: running.engine.scheduler.num_items == MAX_STREAM_IMAGES)
            call.cancel()
            await until(lambda: running.engine.scheduler.num_items == 0)
        finally:
            held.set()
            await blocked


async def test_images_are_read_no_faster_than_they_are_answered(settings: Settings) -> None:
    held, read = threading.Event(), list[int]()

    def images() -> Iterator[bytes]:
        for number in range(100_000):
            read.append(number)
            yield png(0) + bytes(256 * 1024)

    async with running_server(settings) as running, AsyncClient(running.address) as client:
        answers = client.classify_stream("a", images())
        await anext(answers)
        blocked = asyncio.create_task(running.engine.scheduler.run(held.wait))
        try:
            await until(lambda: running.engine.scheduler.num_items >= MAX_STREAM_IMAGES * 3 // 4)
            num_read = 0
            while num_read != len(read):
                num_read = len(read)
                await asyncio.sleep(0.5)
            # Besides what is in work there is what the transport holds.
            assert num_read < 2000
        finally:
            held.set()
            await blocked
            await answers.aclose()


async def test_a_full_server_makes_a_stream_wait(settings: Settings) -> None:
    async with running_server(settings) as running:
        engine = running.engine
        model = await engine.models.get("a")
        answered: list[str] = []

        async def classify(asked: pb.ClassifyRequest) -> pb.ClassifyResponse:
            with engine.scheduler.admit(len(asked.images), model.runtime):
                answered.append(asked.model)
            return pb.ClassifyResponse()

        async def requests() -> Any:
            yield request("waits")

        with engine.scheduler.admit(3072, model.runtime):
            stream = classify_stream(engine, requests(), classify, lambda method, error: None, None)
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.1)
            assert not answered
        assert (await asyncio.wait_for(first, 30)).id == "waits"
        await stream.aclose()


def test_many_files_of_the_command_line(
    server: ServerProcess, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tandem.cli.main import main

    monkeypatch.setenv("TANDEM_INFERENCE_ADDRESS", server.address)
    paths = [tmp_path / f"{number:03}.png" for number in range(80)]
    for number, path in enumerate(paths):
        path.write_bytes(png(number))
    monkeypatch.setattr("sys.argv", ["tandem", "classify", "a", *map(str, paths), "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    document = json.loads(capsys.readouterr().out)
    assert [each["file"] for each in document["results"]] == list(map(str, paths))
    assert document["timings"]["compute_ms"] > 0
    assert document["model"]["version"] == 1
