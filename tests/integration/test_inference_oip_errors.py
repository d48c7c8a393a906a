"""Requests of the Open Inference Protocol that are wrong: each by its status, and by what it names."""

import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from factories import SIZE, png, publish_classifier
from open_inference import InProcess, encoded, infer, number_parameter, refused, request, tensor, text_parameter
from tritonclient.grpc import service_pb2

from tandem.errors import InvalidRequest
from tandem.volume import Volume
from tandem.wire.status import from_rpc_error

pytest_plugins = ["open_inference_fixtures"]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown model": ({"model_name": "nothing"}, "NOT_FOUND", "nothing"),
    "unknown version": ({"model_version": "9"}, "NOT_FOUND", "9"),
    "version that is none": ({"model_version": "v1"}, "INVALID_ARGUMENT", "'v1' is no version"),
    "two versions": ({"model_name": "pictures:1", "model_version": "1"}, "INVALID_ARGUMENT", "names more than a model"),
    "name that is none": ({"model_name": "../x"}, "INVALID_ARGUMENT", "../x"),
    "no input": ({"inputs": [], "raw_input_contents": []}, "INVALID_ARGUMENT", "has 0"),
    "unknown input": (
        {"inputs": [tensor("data")]},
        "INVALID_ARGUMENT",
        "no input 'data'; the model has: pixels, image",
    ),
    "datatype": (
        {"inputs": [tensor(datatype="FP32")]},
        "INVALID_ARGUMENT",
        "inputs.pixels is 'FP32'; it must be UINT8",
    ),
    "half floats": ({"inputs": [tensor(datatype="FP16")]}, "INVALID_ARGUMENT", "inputs.pixels is 'FP16'"),
    "shape": ({"inputs": [tensor(shape=(1, SIZE, SIZE, 3))]}, "INVALID_ARGUMENT", "inputs.pixels has the shape"),
    "no images": ({"inputs": [tensor(shape=(0, 3, SIZE, SIZE))]}, "INVALID_ARGUMENT", "inputs.pixels has the shape"),
    "less than none": ({"inputs": [tensor(shape=(-1, 3, SIZE, SIZE))]}, "INVALID_ARGUMENT", "has the shape"),
    "no shape": ({"inputs": [tensor(shape=())]}, "INVALID_ARGUMENT", "inputs.pixels has the shape []"),
    "many images": ({"inputs": [tensor(shape=(1025, 3, SIZE, SIZE))]}, "INVALID_ARGUMENT", "1,025 images; the limit"),
    "enormous": ({"inputs": [tensor(shape=(2**62, 3, SIZE, SIZE))]}, "INVALID_ARGUMENT", "images; the limit"),
    "too few bytes": ({"raw_input_contents": [b"x"]}, "INVALID_ARGUMENT", "inputs.pixels has 1 bytes; its shape makes"),
    "two raw": ({"raw_input_contents": [b"", b""]}, "INVALID_ARGUMENT", "2 raw_input_contents for 1 inputs"),
    "nothing raw": ({"raw_input_contents": []}, "INVALID_ARGUMENT", "inputs.pixels has 0 elements"),
    "raw and typed": (
        {"inputs": [tensor(contents={"uint_contents": [1]})]},
        "INVALID_ARGUMENT",
        "inputs.pixels has contents beside raw_input_contents",
    ),
    "typed elsewhere": (
        {"inputs": [tensor(contents={"fp32_contents": [1.0]})], "raw_input_contents": None},
        "INVALID_ARGUMENT",
        "has fp32_contents; it goes into uint_contents",
    ),
    "typed out of range": (
        {"inputs": [tensor(contents={"uint_contents": [256] * (3 * SIZE * SIZE)})], "raw_input_contents": None},
        "INVALID_ARGUMENT",
        "has 256 among its values",
    ),
    "both inputs": (
        {"inputs": [tensor(), tensor("image", "BYTES", [1])], "raw_input_contents": [b"", b""]},
        "INVALID_ARGUMENT",
        "give one input",
    ),
    "input twice": (
        {"inputs": [tensor(), tensor()], "raw_input_contents": [b"", b""]},
        "INVALID_ARGUMENT",
        "the input pixels comes twice",
    ),
    "cut length": (
        {"inputs": [tensor("image", "BYTES", [1])], "raw_input_contents": [b"\1\0"]},
        "INVALID_ARGUMENT",
        "inputs.image ends within the length of element 0",
    ),
    "cut element": (
        {"inputs": [tensor("image", "BYTES", [1])], "raw_input_contents": [b"\xff\xff\xff\xff!"]},
        "INVALID_ARGUMENT",
        "inputs.image ends within element 0",
    ),
    "too many elements": (
        {"inputs": [tensor("image", "BYTES", [1])], "raw_input_contents": [b"\0\0\0\0" * 9]},
        "INVALID_ARGUMENT",
        "inputs.image has more than 1 elements; its shape makes 1",
    ),
    "no picture": (
        {"inputs": [tensor("image", "BYTES", [1])], "raw_input_contents": [b"\3\0\0\0no!"]},
        "INVALID_ARGUMENT",
        "inputs.image[0] can't be decoded: not an image",
    ),
    "unknown output": (
        {"outputs": [{"name": "scores"}]},
        "INVALID_ARGUMENT",
        "no output 'scores'; the model has: logits",
    ),
    "output twice": ({"outputs": [{"name": "logits"}] * 2}, "INVALID_ARGUMENT", "the output logits comes twice"),
    "classification": (
        {"outputs": [{"name": "logits", "parameters": {"classification": number_parameter(0)}}]},
        "INVALID_ARGUMENT",
        "outputs.logits: classification is 0",
    ),
    "classification as text": (
        {"outputs": [{"name": "logits", "parameters": {"classification": text_parameter("3")}}]},
        "INVALID_ARGUMENT",
        "outputs.logits: 'classification' must be a whole number",
    ),
    "shared memory": (
        {"inputs": [tensor(parameters={"shared_memory_region": text_parameter("r")})]},
        "INVALID_ARGUMENT",
        "no shared memory",
    ),
    "unknown parameter": ({"parameters": {"max_words": number_parameter(3)}}, "INVALID_ARGUMENT", "'max_words' is no"),
    "priority": ({"parameters": {"priority": number_parameter(4)}}, "INVALID_ARGUMENT", "priority is 4"),
    "negative timeout": ({"parameters": {"timeout": number_parameter(-1)}}, "INVALID_ARGUMENT", "timeout is -1"),
    "sequence": ({"parameters": {"sequence_id": number_parameter(5)}}, "INVALID_ARGUMENT", "'sequence_id' is no"),
    "image to a language model": (
        {"model_name": "words"},
        "INVALID_ARGUMENT",
        "no input 'pixels'; the model has: prompt",
    ),
    "pixels as a prompt": (
        {"model_name": "words", "inputs": [tensor("prompt")]},
        "INVALID_ARGUMENT",
        "inputs.prompt is 'UINT8'; it must be BYTES",
    ),
    "two prompts": (
        {"model_name": "words", "inputs": [tensor("prompt", "BYTES", [2])]},
        "INVALID_ARGUMENT",
        "inputs.prompt has the shape [2]",
    ),
    "no text": (
        {"model_name": "words", "inputs": [tensor("prompt", "BYTES", [1])], "raw_input_contents": [b"\1\0\0\0\xff"]},
        "INVALID_ARGUMENT",
        "inputs.prompt is not UTF-8 text, at byte 0",
    ),
    "temperature": (
        {
            "model_name": "words",
            "inputs": [],
            "raw_input_contents": [],
            "parameters": {"temperature": number_parameter(-1)},
        },
        "INVALID_ARGUMENT",
        "temperature is -1.0",
    ),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_what_is_wrong_is_named(host: InProcess, case: str, tried: "Counter[str]") -> None:
    fields, code, said = WRONG[case]
    with pytest.raises(grpc.RpcError) as caught:
        infer(host, request(**fields))
    error: Any = caught.value
    assert (error.code().name, said in error.details()) == (code, True), error.details()
    tried["tensor or parameter that makes no sense"] += 1


def sampling(**parameters: Any) -> Any:
    return request(
        model_name="words",
        inputs=[],
        raw_input_contents=[],
        parameters={
            name: text_parameter(value) if isinstance(value, str) else number_parameter(value)
            for name, value in parameters.items()
        },
    )


# The call, the request, and the field that it must name: one of its message.
FIELDS: dict[str, tuple[str, Any, str]] = {
    "temperature": ("ModelInfer", sampling(temperature=-1), "parameters.temperature"),
    "seed": ("ModelInfer", sampling(seed=-1), "parameters.seed"),
    "max_words": ("ModelInfer", sampling(max_words=-1), "parameters.max_words"),
    "stop": ("ModelInfer", sampling(stop="nowhere-in-it"), "parameters.stop"),
    "bias of a word that is none": ("ModelInfer", sampling(logit_bias='{"zebra": 1}'), "parameters.logit_bias"),
    "bias out of range": ("ModelInfer", sampling(logit_bias='{"the": 1001}'), "parameters.logit_bias"),
    "bias without end": ("ModelInfer", sampling(logit_bias='{"the": -1e999}'), "parameters.logit_bias"),
    "bias that is no number": ("ModelInfer", sampling(logit_bias='{"the": NaN}'), "parameters.logit_bias"),
    "biases of a kind": ("ModelInfer", sampling(logit_bias='{"the": true}'), "parameters.logit_bias"),
    "biases in a list": ("ModelInfer", sampling(logit_bias="[1]"), "parameters.logit_bias"),
    "biases within biases": ("ModelInfer", sampling(logit_bias='{"the": {"cat": 1}}'), "parameters.logit_bias"),
    "biases that are deep": ("ModelInfer", sampling(logit_bias="[" * 60_000), "parameters.logit_bias"),
    "biases of no end": ("ModelInfer", sampling(logit_bias=" " * 65_537), "parameters.logit_bias"),
    "biases of half a pair": ("ModelInfer", sampling(logit_bias='{"a":'), "parameters.logit_bias"),
    "a word with two biases": ("ModelInfer", sampling(logit_bias='{"the": 1, "the": 2}'), "parameters.logit_bias"),
    "biases as a number": ("ModelInfer", sampling(logit_bias=3), "parameters.logit_bias"),
    "timeout": ("ModelInfer", sampling(timeout=-1), "parameters.timeout"),
    "priority": ("ModelInfer", sampling(priority=9), "parameters.priority"),
    "unknown parameter": ("ModelInfer", sampling(warmth=1), "parameters.warmth"),
    "empty prompt": (
        "ModelInfer",
        request(model_name="words", inputs=[tensor("prompt", "BYTES", [1])], raw_input_contents=[b"\0\0\0\0"]),
        "inputs.prompt",
    ),
    "name to infer": ("ModelInfer", request(model_name="../x"), "model_name"),
    "version to infer": ("ModelInfer", request(model_version="v1"), "model_version"),
    "ready": ("ModelReady", service_pb2.ModelReadyRequest(name="../x"), "name"),
    "version that is ready": ("ModelReady", service_pb2.ModelReadyRequest(name="words", version="v1"), "version"),
    "metadata": ("ModelMetadata", service_pb2.ModelMetadataRequest(name="../x"), "name"),
    "configuration": ("ModelConfig", service_pb2.ModelConfigRequest(name="../x"), "name"),
    "statistics": ("ModelStatistics", service_pb2.ModelStatisticsRequest(name="words:1"), "name"),
    "version of statistics": (
        "ModelStatistics",
        service_pb2.ModelStatisticsRequest(name="words", version="v1"),
        "version",
    ),
    "load": ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="../x"), "model_name"),
    "unload": ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="../x"), "model_name"),
}


@pytest.mark.parametrize("case", sorted(FIELDS))
def test_the_field_that_is_named_is_one_of_the_message(host: InProcess, case: str) -> None:
    method, message, field = FIELDS[case]
    with grpc.insecure_channel(host.address) as channel:
        call: Any = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(message.SerializeToString(), timeout=240)
    error = from_rpc_error(caught.value, host.address)
    assert isinstance(error, InvalidRequest)
    assert error.field == field


def test_a_right_request_is_answered(host: InProcess) -> None:
    # Else each of those above might be refused for another reason.
    assert len(infer(host, request()).raw_output_contents) == 2


def test_the_second_image_that_does_not_decode_is_named(public: Any) -> None:
    code, message = refused(lambda: public.infer("pictures", encoded(png(0), b"GIF89a", png(1))))
    assert code == "INVALID_ARGUMENT"
    assert "inputs.image[1] can't be decoded" in message


def test_typed_contents_are_bounded_before_they_are_parsed(host: InProcess) -> None:
    images = tensor("image", "BYTES", [5000], contents={"bytes_contents": [b""] * 5000})
    numbers = tensor(contents={"uint_contents": [1] * (9 * 1024 * 1024)})
    codes = []
    for each in (images, numbers):
        with pytest.raises(grpc.RpcError) as caught:
            infer(host, request(inputs=[each], raw_input_contents=None))
        error: Any = caught.value
        codes.append((error.code().name, error.details()))
    assert [code for code, _ in codes] == ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"]
    assert "parts" in codes[0][1]
    assert "raw_input_contents" in codes[1][1]


def test_tokens_open_what_their_scopes_name(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    publish_classifier(volume, "pictures", "run-1")
    predict, admin = (secrets.token_hex(32) for _ in range(2))
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(f"predict {predict}\nadmin {admin}\n")
    host = InProcess(volume.home, TANDEM_TOKENS_FILE=str(tokens))
    try:
        with triton.InferenceServerClient(host.address) as client:
            assert client.is_server_ready()
            assert refused(lambda: client.infer("pictures", encoded(png(0))))[0] == "UNAUTHENTICATED"
            assert refused(client.get_trace_settings)[0] == "UNAUTHENTICATED"
            headers = {"authorization": f"Bearer {predict}"}
            assert client.infer("pictures", encoded(png(0)), headers=headers).as_numpy("logits").shape == (1, 5)
            code, _ = refused(lambda: client.unload_model("pictures", headers=headers))
            assert code == "PERMISSION_DENIED"
            client.unload_model("pictures", headers={"authorization": f"Bearer {admin}"})
    finally:
        host.close()


def test_too_large_an_answer_is_refused(public: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.inference.oip.classifiers.MAX_ANSWERS", 5)
    outputs = [triton.InferRequestedOutput("logits", class_count=3)]
    code, message = refused(lambda: public.infer("pictures", encoded(png(0), png(1)), outputs=outputs))
    assert (code, "6 answers; the limit is 5" in message) == ("RESOURCE_EXHAUSTED", True)
    monkeypatch.setattr("services.inference.oip.classifiers.MAX_OUTPUT_BYTES", 39)
    code, message = refused(lambda: public.infer("pictures", encoded(png(0))))
    assert (code, "the outputs have 40 bytes; the limit is 39" in message) == ("RESOURCE_EXHAUSTED", True)
