"""The public client of the Open Inference Protocol, blocking and asyncio: what it asks, and what it gets."""

import asyncio
import threading
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from factories import CLASS_IDS, SIZE, png
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from open_inference import (
    InProcess,
    encoded,
    infer,
    parameters,
    pixels,
    refused,
)
from tritonclient.grpc import model_config_pb2, service_pb2

import tandem
from tandem.client import Client
from tandem.data.images import decode_image
from tandem.wire.limits import MAX_IMAGES
from tandem.wire.oip import grpc_service_pb2 as pb

pytest_plugins = ["open_inference_fixtures"]


# What the server and its models are


def test_our_definitions_are_those_of_the_public_client() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    compared: set[str] = set()
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        other = theirs.methods_by_name[method.name]
        assert (method.client_streaming, method.server_streaming) == (other.client_streaming, other.server_streaming)
        compare(method.input_type, other.input_type, compared)
        compare(method.output_type, other.output_type, compared)
    assert dict(pb.DataType.items()) == dict(model_config_pb2.DataType.items())
    assert len(compared) > 40


def compare(message: Any, other: Any, compared: set[str]) -> None:
    assert message.full_name == other.full_name
    if message.full_name in compared:
        return
    compared.add(message.full_name)
    for field in message.fields:
        # Of the protocol, and not of the public client's superset.
        if (message.name, field.name) == ("ModelMetadataResponse", "properties"):
            continue
        theirs = other.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (theirs.number, theirs.type, theirs.is_repeated)
        if field.message_type is not None:
            compare(field.message_type, theirs.message_type, compared)


def test_the_server_says_who_it_is(public: Any) -> None:
    assert public.is_server_live()
    assert public.is_server_ready()
    metadata = public.get_server_metadata()
    assert (metadata.name, metadata.version) == ("tandem", tandem.__version__)
    assert {"classification", "statistics", "model_configuration", "model_repository"} <= set(metadata.extensions)


def test_the_limits_are_published(host: InProcess) -> None:
    with grpc.insecure_channel(host.address) as channel:
        ask: Any = channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
        metadata = dict(ask.with_call(b"")[1].initial_metadata())
    assert metadata["tandem-limit-images-per-message"] == str(MAX_IMAGES)


def test_reflection_and_health_know_the_service(host: InProcess) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
            for symbol in (
                "inference.GRPCInferenceService",
                "inference.ModelInferRequest",
                "tandem.v1.Inference",
                "x.Y",
            )
        ),
    ]
    with grpc.insecure_channel(host.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        services, *files, unknown = stub.ServerReflectionInfo(iter(requests))
    assert "inference.GRPCInferenceService" in {each.name for each in services.list_services_response.service}
    assert all(each.file_descriptor_response.file_descriptor_proto for each in files)
    assert unknown.error_response.error_code == 5


def test_what_a_classifier_takes_and_gives(public: Any) -> None:
    metadata = public.get_model_metadata("pictures")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("pictures", ["1", "2"], "tandem_eager")
    tensors = {each.name: (each.datatype, list(each.shape)) for each in (*metadata.inputs, *metadata.outputs)}
    assert tensors == {
        "pixels": ("UINT8", [-1, 3, SIZE, SIZE]),
        "image": ("BYTES", [-1]),
        "logits": ("FP32", [-1, len(CLASS_IDS)]),
        "probabilities": ("FP32", [-1, len(CLASS_IDS)]),
    }
    config = public.get_model_config("pictures").config
    assert (config.name, config.max_batch_size, config.backend) == ("pictures", MAX_IMAGES, "tandem")
    assert {each.name: list(each.dims) for each in config.input} == {"pixels": [3, SIZE, SIZE], "image": []}
    assert config.dynamic_batching.priority_levels == 3
    assert config.parameters["architecture"].string_value == "squeezenet1_1"
    assert config.parameters["run_id"].string_value == "run-2"
    assert public.get_model_config("pictures", "1").config.parameters["run_id"].string_value == "run-1"


def test_what_a_language_model_takes_and_gives(public: Any) -> None:
    metadata = public.get_model_metadata("words")
    tensors = {each.name: (each.datatype, list(each.shape)) for each in (*metadata.inputs, *metadata.outputs)}
    assert tensors == {"prompt": ("BYTES", [1]), "text": ("BYTES", [1])}
    config = public.get_model_config("words").config
    assert (config.max_batch_size, config.model_transaction_policy.decoupled) == (0, True)


def test_which_models_are_ready(public: Any) -> None:
    assert public.is_model_ready("pictures")
    assert public.is_model_ready("pictures", "1")
    assert not public.is_model_ready("pictures", "7")
    assert not public.is_model_ready("nothing")


def test_pixels_and_images_give_what_classify_gives(public: Any, ours: Client) -> None:
    images = [png(number) for number in range(3)]
    want = ours.classify("pictures", images, top_k=len(CLASS_IDS))
    by_image = public.infer("pictures", encoded(*images), request_id="mine")
    by_pixels = public.infer("pictures", pixels(*images))
    for name in ("logits", "probabilities"):
        assert by_image.as_numpy(name).dtype == np.float32
        assert np.array_equal(by_image.as_numpy(name), by_pixels.as_numpy(name))
    for row, result in zip(by_image.as_numpy("probabilities"), want.results, strict=True):
        assert [float(row[each.index]) for each in result.top_k] == [each.probability for each in result.top_k]
    logits = by_image.as_numpy("logits").astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(shares, by_image.as_numpy("probabilities"), atol=1e-6)
    response = by_image.get_response()
    assert (response.model_name, response.model_version, response.id) == ("pictures", "2", "mine")
    assert [output.name for output in response.outputs] == ["logits", "probabilities"]
    told = parameters(by_image)
    assert told["dtype"] == "float32"
    assert told["decode_ms"] > 0 < told["compute_ms"]


def test_a_column_of_images_is_taken_too(public: Any) -> None:
    tensor = triton.InferInput("image", [2, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[png(0)], [png(1)]], dtype=np.object_))
    assert np.array_equal(
        public.infer("pictures", [tensor]).as_numpy("logits"),
        public.infer("pictures", encoded(png(0), png(1))).as_numpy("logits"),
    )


def test_outputs_come_in_the_order_asked_for(public: Any) -> None:
    outputs = [triton.InferRequestedOutput(name) for name in ("probabilities", "logits")]
    both = public.infer("pictures", encoded(png(0)), outputs=outputs)
    assert [output.name for output in both.get_response().outputs] == ["probabilities", "logits"]
    one = public.infer("pictures", encoded(png(0)), outputs=outputs[:1])
    assert one.as_numpy("logits") is None
    assert np.array_equal(one.as_numpy("probabilities"), both.as_numpy("probabilities"))


@pytest.mark.parametrize(("asked", "given"), [(2, 2), (50, len(CLASS_IDS))])
def test_classification_names_the_best(public: Any, ours: Client, asked: int, given: int) -> None:
    images = [png(number) for number in range(3)]
    outputs = [triton.InferRequestedOutput("probabilities", class_count=asked), triton.InferRequestedOutput("logits")]
    result = public.infer("pictures", encoded(*images), outputs=outputs)
    labels, logits = result.as_numpy("probabilities"), result.as_numpy("logits")
    assert labels.shape == (3, given)
    want = ours.classify("pictures", images, top_k=given)
    for row, classified in zip(labels, want.results, strict=True):
        found = [label.decode().split(":", 2) for label in row]
        assert [(np.float32(value), int(index), name) for value, index, name in found] == [
            (np.float32(each.probability), each.index, each.words) for each in classified.top_k
        ]
    ranked = public.infer("pictures", encoded(*images), outputs=[triton.InferRequestedOutput("logits", asked)])
    for row, numbers in zip(ranked.as_numpy("logits"), logits, strict=True):
        value, index, _ = row[0].decode().split(":", 2)
        assert (np.float32(value), int(index)) == (numbers.max(), int(numbers.argmax()))


def test_versions_and_aliases(public: Any) -> None:
    answers = {
        (name, version): public.infer(name, encoded(png(3)), model_version=version)
        for name, version in (("pictures", ""), ("pictures", "1"), ("pictures", "2"), ("pictures@latest", ""))
    }
    told = {asked: result.get_response().model_version for asked, result in answers.items()}
    assert list(told.values()) == ["2", "1", "2", "2"]
    logits = [result.as_numpy("logits") for result in answers.values()]
    assert np.array_equal(logits[0], logits[2])
    assert not np.array_equal(logits[0], logits[1])


def test_typed_contents_are_taken_and_raw_ones_come_back(host: InProcess) -> None:
    image = decode_image(png(0)).numpy()
    typed = service_pb2.ModelInferRequest(model_name="pictures", id="t")
    tensor = typed.inputs.add(name="pixels", datatype="UINT8", shape=[1, 3, SIZE, SIZE])
    tensor.contents.uint_contents.extend(image.flatten().tolist())
    encoded_too = service_pb2.ModelInferRequest(model_name="pictures")
    tensor = encoded_too.inputs.add(name="image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(png(0))
    answers = [infer(host, each) for each in (typed, encoded_too)]
    assert [len(answer.raw_output_contents) for answer in answers] == [2, 2]
    assert answers[0].raw_output_contents == answers[1].raw_output_contents
    assert not any(output.HasField("contents") for answer in answers for output in answer.outputs)


def test_a_request_waits_no_longer_than_its_timeout(public: Any, host: InProcess) -> None:
    opened = threading.Event()
    holding = asyncio.run_coroutine_threadsafe(host.running.engine.scheduler.run(lambda: opened.wait(60)), host.loop)
    timer = threading.Timer(0.5, opened.set)
    timer.start()
    # Behind what holds the device, until the timeout has passed in the queue.
    code, _ = refused(lambda: public.infer("pictures", encoded(png(0)), timeout=100_000))
    assert code == "DEADLINE_EXCEEDED"
    assert opened.is_set()
    holding.result(10)
    timer.join()
    assert public.infer("pictures", encoded(png(0)), timeout=20_000_000, priority=1).as_numpy("logits").shape == (1, 5)


def test_calls_of_both_protocols_share_batches(host: InProcess, ours: Client) -> None:
    engine, sizes, opened = host.running.engine, list[int](), threading.Event()
    served: Any = asyncio.run_coroutine_threadsafe(engine.models.get("pictures"), host.loop).result(10)
    network = served.runtime._network
    hook = network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    alone = ours.classify("pictures", [png(0)]).results[0].top_k
    holding = asyncio.run_coroutine_threadsafe(engine.scheduler.run(lambda: opened.wait(60)), host.loop)

    async def call() -> tuple[list[Any], list[Any]]:
        async with triton_aio.InferenceServerClient(host.address) as client:
            theirs = [asyncio.create_task(client.infer("pictures", encoded(png(number)))) for number in range(8)]
            mixed = [asyncio.to_thread(ours.classify, "pictures", [png(number)]) for number in range(4)]
            classified = asyncio.gather(*mixed)
            while engine.scheduler.num_waiting < 12:
                await asyncio.sleep(0.005)
            opened.set()
            return await asyncio.gather(*theirs), await classified

    try:
        sizes.clear()
        inferred, classified = asyncio.run(call())
    finally:
        opened.set()
        hook.remove()
    holding.result(10)
    assert sizes == [12]
    probabilities = [result.as_numpy("probabilities")[0] for result in inferred]
    for row, answer in zip(probabilities, classified, strict=False):
        (result,) = answer.results
        assert [float(row[each.index]) for each in result.top_k] == [each.probability for each in result.top_k]
    assert classified[0].results[0].top_k == alone


def test_both_modules_live_in_one_process() -> None:
    # Of the same names, and each in a pool of its own: in one they would clash on import.
    assert pb.DESCRIPTOR.pool is not service_pb2.DESCRIPTOR.pool
    message = service_pb2.ModelInferRequest(model_name="a", id="b")
    assert pb.ModelInferRequest.FromString(message.SerializeToString()) == pb.ModelInferRequest(model_name="a", id="b")
