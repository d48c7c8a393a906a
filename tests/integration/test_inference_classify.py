"""Classify, over gRPC, against a real server with real checkpoints of small networks."""

import grpc
import pytest
from factories import picture, png
from inference_server import ServerProcess

from tandem.client import Client, RawImage
from tandem.errors import (
    InvalidReference,
    InvalidRequest,
    LimitExceeded,
    ModelNotFound,
    RunNotFound,
    TandemError,
)
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

pytest_plugins = ["inference_fixtures"]


def test_one_image(client: Client) -> None:
    answer = client.classify("a", [("one.png", png(1))])
    assert (answer.model.label, answer.model.architecture, answer.model.dtype) == (
        "a:1",
        "squeezenet1_1",
        "float32",
    )
    (result,) = answer.results
    assert result.name == "one.png"
    assert len(result.top_k) == 5
    assert sum(each.probability for each in result.top_k) == pytest.approx(1, abs=1e-5)
    assert sorted(result.top_k, key=lambda each: -each.probability) == list(result.top_k)
    assert result.top_k[0].words == f"thing {result.top_k[0].id[1:]}"
    assert answer.timings.compute_ms > 0


def test_alone_and_among_forty_the_probabilities_are_identical(client: Client) -> None:
    for model in ("a", "three"):
        together = client.classify(model, [png(number) for number in range(41)]).results
        alone = [client.classify(model, [png(number)]).results[0] for number in range(41)]
        assert tuple(alone) == together


def test_a_broken_image_fails_alone(client: Client) -> None:
    images = [png(0), b"junk", png(1), b"", png(2)[:200]]
    results = client.classify("a", images).results
    assert [bool(result.error) for result in results] == [False, True, False, True, True]
    assert results[0] == client.classify("a", [png(0)]).results[0]
    assert all(not result.top_k for result in results if result.error)


def test_all_broken_is_still_an_answer(client: Client) -> None:
    assert all(result.error for result in client.classify("a", [b"x", b"y"]).results)


def test_raw_pixels_answer_as_the_encoded_image_and_fail_alone(client: Client) -> None:
    images = [picture(number, 50, 40) for number in range(3)]
    raw = [RawImage(50, 40, image.tobytes()) for image in images]
    wrong = RawImage(50, 40, images[0].tobytes()[:-1])
    expected = client.classify("a", [png(number, 50, 40) for number in range(3)]).results
    *results, failed, again = client.classify("a", [*raw, wrong, ("again", raw[0])]).results
    assert tuple(results) == expected
    assert (again.name, again.top_k) == ("again", expected[0].top_k)
    assert "5,999 bytes; 50×40 pixels of RGB are 6,000" in failed.error
    same = client.compare("a", "b", raw).results
    assert same == client.compare("a", "b", [png(number, 50, 40) for number in range(3)]).results
    with pytest.raises(InvalidRequest, match="can't be written"):
        client.classify("a", [RawImage(2**40, 1, b"")])


def test_an_image_without_content(client: Client, server: ServerProcess) -> None:
    request = pb.ClassifyRequest(model="a", images=[pb.Image(name="none"), pb.Image(raw=pb.RawImage())])
    with grpc.insecure_channel(server.address) as channel:
        answer = rpc.InferenceStub(channel).Classify(request)  # type: ignore[no-untyped-call]
    assert "is empty (0 bytes)" in answer.results[0].error
    assert "0×0 pixels" in answer.results[1].error


def test_top_k(client: Client) -> None:
    assert [len(client.classify("three", [png(1)], top_k).results[0].top_k) for top_k in (0, 1, 2, 99)] == [
        3,
        1,
        2,
        3,
    ]
    with pytest.raises(InvalidRequest, match="top_k is -1") as caught:
        client.classify("a", [png(1)], -1)
    assert caught.value.field == "top_k"


def test_many_go_out_in_several_messages(client: Client) -> None:
    answer = client.classify("a", [(str(number), png(number % 5)) for number in range(600)], 1)
    assert [result.name for result in answer.results] == [str(number) for number in range(600)]


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("nope", ModelNotFound),
        ("a:9", ModelNotFound),
        ("a@production", ModelNotFound),
        ("run:nope", RunNotFound),
        ("../a", InvalidReference),
        ("", InvalidReference),
        ("LSTM", InvalidRequest),
    ],
)
def test_a_wrong_model(client: Client, reference: str, kind: type[TandemError]) -> None:
    with pytest.raises(kind):
        client.classify(reference, [png(0)])


def test_no_images_and_too_many(server: ServerProcess, client: Client) -> None:
    with pytest.raises(InvalidRequest, match="no images"):
        client.classify("a", [])
    with grpc.insecure_channel(server.address) as channel:
        stub = rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError, match="limit is 1024"):
            stub.Classify(pb.ClassifyRequest(model="a", images=[pb.Image(data=b"x")] * 1025))
        with pytest.raises(grpc.RpcError) as caught:
            stub.Classify(pb.ClassifyRequest(model="a", images=[pb.Image(data=bytes(65 << 20))]))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(LimitExceeded):
        client.classify("a", [bytes(65 << 20)])


def test_a_run_is_a_model_too(client: Client) -> None:
    answer = client.classify("run:run-a/1", [png(0)])
    assert answer.model.label == "run:run-a/1"
    assert answer.results == client.classify("a", [png(0)]).results


def test_a_client_says_how_urgent_its_calls_are(server: ServerProcess) -> None:
    with Client(server.address, priority="high") as client:
        assert not client.classify("a", [png(0)]).results[0].error
    with (
        Client(server.address, priority="soon") as client,
        pytest.raises(InvalidRequest, match="it is low, normal or high"),
    ):
        client.classify("a", [png(0)])
