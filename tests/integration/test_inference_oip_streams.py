"""Texts and streams of the Open Inference Protocol, with both public clients."""

import asyncio
import json
import queue
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton_aio
from factories import png
from open_inference import (
    FINAL,
    InProcess,
    encoded,
    parameters,
    prompt,
)
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException
from waiting import wait_for

from tandem.client import Client, SamplingOptions, TextPiece
from tandem.wire.results import GenerationSummary

pytest_plugins = ["open_inference_fixtures"]


def test_a_text_whole(public: Any, ours: Client) -> None:
    options = {"max_words": 12, "seed": 7, "temperature": 0.8, "top_k": 9, "stop": "dog <eos>"}
    result = public.infer("words", prompt("the cat"), parameters=options, request_id="text")
    sampling = SamplingOptions(temperature=0.8, top_k=9, seed=7, stop=("dog", "<eos>"))
    *pieces, summary = ours.generate("words", "the cat", 12, sampling)
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    assert result.as_numpy("text").tolist() == [text.encode()]
    told = parameters(result)
    assert isinstance(summary, GenerationSummary)
    assert (told["seed"], told["num_words"], told["finish_reason"]) == (7, summary.num_words, summary.finish_reason)
    assert (told["num_prompt_tokens"], told["dtype"]) == (2, "float32")
    assert result.get_response().id == "text"


def test_biases_are_a_json_object(public: Any, ours: Client) -> None:
    forced = public.infer("words", [], parameters={"max_words": 4, "seed": 1, "logit_bias": '{"dog": 1000}'})
    assert forced.as_numpy("text")[0].split() == [b"dog"] * 4
    biases = {"the": -2.5, "dog": 3.0, "<eos>": -1000.0}
    options = {"max_words": 12, "seed": 7, "logit_bias": json.dumps(biases)}
    *pieces, _ = ours.generate("words", "the cat", 12, SamplingOptions(seed=7, logit_bias=biases))
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    assert public.infer("words", prompt("the cat"), parameters=options).as_numpy("text").tolist() == [text.encode()]


def test_a_text_without_a_prompt(public: Any) -> None:
    first, again = (public.infer("words", [], parameters={"max_words": 5, "seed": 3}) for _ in range(2))
    assert first.as_numpy("text").tolist() == again.as_numpy("text").tolist() != [b""]
    # A seed of 64 bits comes back as it was picked or given.
    large = service_pb2.ModelInferRequest(model_name="words")
    large.parameters["seed"].uint64_param = 2**64 - 1
    assert public._client_stub.ModelInfer(large).parameters["seed"].uint64_param == 2**64 - 1


def collect(client: Any, send: Callable[[Any], object], num_final: int, **options: Any) -> list[tuple[Any, Any]]:
    """Return what comes on a stream until so many final answers or errors are there."""
    told: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: told.put((result, error)), **options)
    try:
        send(client)
        found: list[tuple[Any, Any]] = []
        while num_final:
            result, error = told.get(timeout=120)
            found.append((result, error))
            num_final -= error is not None or parameters(result)[FINAL]
        return found
    finally:
        client.stop_stream()


def test_a_stream_tells_a_text_word_by_word(public: Any) -> None:
    options = {"max_words": 200, "seed": 5}
    whole = public.infer("words", prompt("the cat"), parameters=options).as_numpy("text")[0]

    def send(client: Any) -> None:
        client.async_stream_infer("words", prompt("the cat"), request_id="s", parameters=options)

    found = [result for result, _ in collect(public, send, 1)]
    assert len(found) > 2
    assert b"".join(result.as_numpy("text")[0] for result in found) == whole
    assert {result.get_response().id for result in found} == {"s"}
    assert [parameters(result)[FINAL] for result in found] == [False] * (len(found) - 1) + [True]
    assert parameters(found[-1])["num_words"] == 200


def test_a_stream_answers_in_order_and_goes_on_after_an_error(public: Any) -> None:
    def send(client: Any) -> None:
        client.async_stream_infer("words", prompt("the cat"), request_id="0", parameters={"max_words": 300})
        client.async_stream_infer("nothing", encoded(png(0)), request_id="1")
        client.async_stream_infer("pictures", encoded(b"none"), request_id="2")
        for number in range(3, 40):
            client.async_stream_infer("pictures", encoded(png(number)), request_id=str(number))

    found = collect(public, send, 40)
    errors = [(place, str(error)) for place, (_, error) in enumerate(found) if error is not None]
    assert "no model 'nothing'" in errors[0][1]
    assert "inputs.image[0] can't be decoded" in errors[1][1]
    assert (len(errors), errors[1][0] - errors[0][0]) == (2, 1)
    results = [result for result, error in found if error is None]
    numbers = [int(result.get_response().id) for result in results]
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, *range(3, 40)}
    one = public.infer("pictures", encoded(png(39)))
    assert np.array_equal(results[-1].as_numpy("logits"), one.as_numpy("logits"))


def test_a_stream_ends_with_a_status_for_who_wants_it(public: Any) -> None:
    def send(client: Any) -> None:
        client.async_stream_infer("nothing", encoded(png(0)))

    ((_, error),) = collect(public, send, 1, headers={"triton_grpc_error": "true"})
    assert error.status() == "StatusCode.NOT_FOUND"


def test_a_stream_that_is_left_gives_its_place_back(public: Any, host: InProcess) -> None:
    told: queue.Queue[Any] = queue.Queue()
    public.start_stream(lambda result, error: told.put(result or error))
    for _ in range(3):
        public.async_stream_infer("words", prompt("the cat"), parameters={"max_words": 100_000})
    told.get(timeout=120)
    public.stop_stream(cancel_requests=True)
    wait_for(lambda: host.running.engine.scheduler.num_items == 0)


def test_a_slow_reader_holds_up_nobody_else(host: InProcess, public: Any) -> None:
    requests = [service_pb2.ModelInferRequest(model_name="words") for _ in range(2)]
    for each in requests:
        each.parameters["max_words"].int64_param = 100_000
    with grpc.insecure_channel(host.address) as channel:
        call: Any = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        )
        answers = call(iter(requests))
        next(answers)
        assert public.infer("pictures", encoded(png(0)), client_timeout=240).as_numpy("logits").shape == (1, 5)
        answers.cancel()
    wait_for(lambda: host.running.engine.scheduler.num_items == 0)


async def test_the_asyncio_client_does_the_same(host: InProcess) -> None:
    async with triton_aio.InferenceServerClient(host.address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("pictures")
        assert (await client.get_model_metadata("pictures")).name == "pictures"
        assert (await client.get_model_config("words")).config.name == "words"
        results = await asyncio.gather(*(client.infer("pictures", encoded(png(number))) for number in range(6)))
        assert [result.as_numpy("logits").shape for result in results] == [(1, 5)] * 6
        with pytest.raises(InferenceServerException, match="no model 'nothing'"):
            await client.infer("nothing", encoded(png(0)))
        told = [each async for each in client.stream_infer(_requests())]
    errors = [str(error) for _, error in told if error is not None]
    assert len(errors) == 1
    assert parameters(told[-1][0])[FINAL]
    assert told[-1][0].get_response().id == "last"


async def _requests() -> Any:
    yield {"model_name": "words", "inputs": prompt("the cat"), "parameters": {"max_words": 20}, "request_id": "first"}
    yield {"model_name": "nothing", "inputs": [], "request_id": "middle"}
    yield {"model_name": "pictures", "inputs": encoded(png(0)), "request_id": "last"}
