"""The Models service, health, reflection, and models that come and break while the server runs."""

import json
from typing import Any

import grpc
import pytest
from factories import CLASS_IDS, break_weights, png, publish_classifier
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from inference_server import ServerProcess
from waiting import PATIENCE_S, wait_for

from tandem.client import Client
from tandem.errors import CheckpointCorrupt, DeadlineExceeded, ModelNotFound, ServerUnavailable

pytest_plugins = ["inference_fixtures"]


def test_list_and_get(client: Client) -> None:
    client.classify("a", [png(0)])
    models = {model.name: model for model in client.list_models()}
    assert models["a"].kind == "classifier"
    assert models["LSTM"].kind == "language_model"
    assert models["a"].aliases == {"latest": 1, "best": 1}
    assert models["a"].loaded == (1,)
    details = client.get_model("b")
    assert details.class_ids == CLASS_IDS[::-1]
    assert (details.image_size, details.vocabulary_size) == (32, 0)
    assert client.get_model("LSTM").vocabulary_size > 10
    assert client.get_model("LSTM").runtime is None
    with pytest.raises(ModelNotFound):
        client.get_model("nope")


def test_a_model_says_how_it_is_run_and_why(server: ServerProcess, client: Client) -> None:
    runtime = client.get_model("a").runtime
    assert runtime is not None
    assert runtime.dtype == client.classify("a", [png(0)]).model.dtype == "float32"
    assert runtime.name in ("eager", "openvino")
    assert " ms for 1 and 32 images, against " in runtime.reason
    assert 0 <= runtime.mean_probability_drift <= runtime.max_probability_drift <= 1e-5
    assert f"a:1 in float32 runs on {runtime.reason}" in server.log.read_text()


def test_health_follows_a_model_out_of_service_and_back(server: ServerProcess, client: Client) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        def status() -> Any:
            return stub.Check(health_pb2.HealthCheckRequest(service="models/three")).status

        client.unload_model("three")
        wait_for(lambda: status() == health_pb2.HealthCheckResponse.NOT_SERVING)
        client.load_model("three")
        wait_for(lambda: status() == health_pb2.HealthCheckResponse.SERVING)


def test_health_and_reflection(server: ServerProcess, client: Client) -> None:
    with grpc.insecure_channel(server.address) as channel:
        # Its stub for types lacks Check.
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tandem.v1.Inference", "models/a", "models/LSTM"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="models/nope"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"tandem.v1.Inference", "tandem.v1.Models", "grpc.health.v1.Health"} <= set(database.get_services())
        # What the contract imports is told too.
        assert "google/rpc/status.proto" in database.FindFileContainingSymbol("tandem.v1.Inference").dependency
        assert database.FindFileByName("google/rpc/status.proto").package == "google.rpc"
    with pytest.raises(DeadlineExceeded, match="'nope' is not served"):
        client.wait_until_serving("nope", timeout_s=0.3)


def test_models_appear_and_are_swapped_without_a_restart(server: ServerProcess, client: Client) -> None:
    with pytest.raises(ModelNotFound):
        client.classify("new", [png(0)])
    publish_classifier(server.volume, "new", "run-new-1", seed=3)
    client.wait_until_serving("new", timeout_s=PATIENCE_S)
    assert client.classify("new", [png(0)]).model.version == 1
    publish_classifier(server.volume, "new", "run-new-2", seed=4)
    wait_for(lambda: client.classify("new", [png(0)]).model.version == 2)
    assert client.classify("new:1", [png(0)]).model.version == 1


def test_a_broken_version_is_refused_and_the_old_one_goes_on(server: ServerProcess, client: Client) -> None:
    publish_classifier(server.volume, "torn", "run-torn-1", seed=5)
    client.wait_until_serving("torn", timeout_s=PATIENCE_S)
    before = client.classify("torn", [png(0)])
    # Broken before it is published, so that the server never sees it whole.
    version = publish_classifier(server.volume, "staged", "run-torn-2", seed=6)
    break_weights(server.volume, version)
    document = json.loads((server.volume.model("staged") / "versions" / "0001.json").read_bytes())
    document.update(name="torn", version=2)
    (server.volume.model("torn") / "versions" / "0002.json").write_text(json.dumps(document))
    (server.volume.model("torn") / "aliases.json").write_text('{"latest": 2, "best": 2}')
    wait_for(lambda: "torn:2 can't be loaded" in server.log.read_text())
    assert client.classify("torn", [png(0)]).results == before.results
    assert client.classify("torn@latest", [png(0)]).model.version == 1
    with pytest.raises(CheckpointCorrupt, match="torn:2 can't be served") as caught:
        client.classify("torn:2", [png(0)])
    assert "model.safetensors is altered" in str(caught.value)
    # No path of the server's crosses the wire; its log has it.
    for secret in (str(server.volume.home), "checkpoints/", "$TANDEM_HOME"):
        assert secret not in str(caught.value)
    assert f"{server.volume.home}/runs/run-torn-2/checkpoints/" in server.log.read_text()
    client.wait_until_serving("torn", timeout_s=1)


def test_a_server_that_is_not_there() -> None:
    with Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(ServerUnavailable, match="tandem up"):
        client.classify("a", [png(0)])
