"""Load, unload, index and statistics of the Open Inference Protocol."""

import queue
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from factories import break_weights, png, publish_classifier, publish_language_model
from open_inference import InProcess, encoded, refused
from tritonclient.grpc import service_pb2
from waiting import wait_for

from tandem.client import Client
from tandem.volume import Volume

pytest_plugins = ["open_inference_fixtures"]


def test_the_index_load_and_unload(public: Any) -> None:
    public.load_model("others")
    assert index(public)["others", "1"] == ("READY", "")
    public.unload_model("others")
    assert index(public)["others", "1"] == ("UNAVAILABLE", "unloaded")
    assert not public.is_model_ready("others")
    code, message = refused(lambda: public.infer("others", encoded(png(0))))
    assert (code, "was unloaded" in message) == ("UNAVAILABLE", True)
    assert ("others", "1") not in {
        (each.name, each.version) for each in public.get_model_repository_index().models if each.state == "READY"
    }
    public.load_model("others")
    assert public.is_model_ready("others")
    assert public.infer("others", encoded(png(0))).as_numpy("logits").shape == (1, 5)


def index(client: Any) -> dict[tuple[str, str], tuple[str, str]]:
    return {(each.name, each.version): (each.state, each.reason) for each in client.get_model_repository_index().models}


def test_a_broken_version_is_told_with_its_reason(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    publish_classifier(volume, "pictures", "run-1")
    publish_language_model(volume, "words", "run-l")
    host = InProcess(volume.home)
    try:
        with triton.InferenceServerClient(host.address) as client, Client(host.address) as ours:
            break_weights(volume, publish_classifier(volume, "pictures", "run-2", seed=2))
            assert refused(lambda: client.infer("pictures", encoded(png(0)), model_version="2"))[0] != "OK"
            (model,) = (each for each in ours.list_models() if each.name == "pictures")
            assert "SHA-256" in model.failed[2]
            assert index(client) == {
                ("pictures", "1"): ("READY", ""),
                ("pictures", "2"): ("UNAVAILABLE", model.failed[2]),
                ("words", "1"): ("READY", ""),
            }
            assert str(volume.home) not in model.failed[2]
    finally:
        host.close()


def test_only_what_is_ready(host: InProcess, public: Any) -> None:
    public.infer("pictures", encoded(png(0)), model_version="1")
    answer = public._client_stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True))
    assert {(each.name, each.version) for each in answer.models} >= {("pictures", "1"), ("pictures", "2")}
    assert {each.state for each in answer.models} == {"READY"}


def test_what_the_repository_refuses(public: Any) -> None:
    assert refused(lambda: public.load_model("nothing"))[0] == "NOT_FOUND"
    assert refused(lambda: public.unload_model("nothing"))[0] == "NOT_FOUND"
    assert refused(lambda: public.load_model("pictures", config="{}"))[0] == "INVALID_ARGUMENT"
    assert refused(lambda: public.unload_model("../.."))[0] == "INVALID_ARGUMENT"
    assert refused(lambda: public.get_inference_statistics("nothing"))[0] == "NOT_FOUND"
    assert refused(lambda: public.get_inference_statistics("pictures", "x"))[0] == "INVALID_ARGUMENT"
    with pytest.raises(grpc.RpcError) as caught:
        public._client_stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(repository_name="r"))
    assert "there is no repository 'r'" in str(caught.value)


def test_what_is_not_offered_is_unimplemented(public: Any) -> None:
    for call in (
        public.get_system_shared_memory_status,
        public.get_cuda_shared_memory_status,
        public.get_trace_settings,
        public.get_log_settings,
    ):
        assert refused(call)[0] == "UNIMPLEMENTED"


def test_statistics_count_what_was_done(public: Any, ours: Client) -> None:
    public.unload_model("others")
    public.load_model("others")
    public.infer("others", encoded(png(0), png(1), png(2)))
    ours.classify("others", [png(0)])
    refused(lambda: public.infer("others", encoded(b"none")))
    # The lane of a call is counted when the call has ended, just after its answer.
    wait_for(lambda: statistics(public, "others").inference_stats.fail.count == 1)
    told = statistics(public, "others")
    assert (told.name, told.version, told.inference_count, told.execution_count) == ("others", "1", 4, 2)
    stats = told.inference_stats
    parts = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    assert [each.count for each in (stats.success, *parts)] == [2] * 5
    assert stats.success.ns == pytest.approx(sum(each.ns for each in parts), rel=0.01)
    assert {each.batch_size: each.compute_infer.count for each in told.batch_stats} == {1: 1, 3: 1}
    assert abs(told.last_inference / 1000 - time.time()) < 60
    (same,) = public.get_inference_statistics("others", "01").model_stats
    assert (same.version, same.inference_count) == ("1", 4), "a version is a number"
    everything = public.get_inference_statistics().model_stats
    assert {"others", "pictures", "words"} <= {each.name for each in everything}


def statistics(client: Any, name: str) -> Any:
    (told,) = client.get_inference_statistics(name, "1").model_stats
    return told


def test_a_given_up_text_is_counted_apart(public: Any, host: InProcess) -> None:
    def counted() -> tuple[int, int]:
        told = statistics(public, "words").inference_stats
        return told.success.count, told.fail.count

    success, fail = counted()
    public.infer("words", [], parameters={"max_words": 2})
    wait_for(lambda: counted() == (success + 1, fail))
    answers: queue.Queue[Any] = queue.Queue()
    public.start_stream(lambda result, error: answers.put(result or error))
    public.async_stream_infer("words", [], parameters={"max_words": 100_000})
    answers.get(timeout=120)
    public.stop_stream(cancel_requests=True)
    wait_for(lambda: counted() == (success + 1, fail + 1))
