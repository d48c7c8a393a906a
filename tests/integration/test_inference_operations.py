"""What an operator sees of a real server: metrics, traces, its log, and how it stops."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from factories import png, publish_classifier, publish_language_model
from grpc_health.v1 import health_pb2, health_pb2_grpc
from inference_server import ServerProcess, start_server
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE_S, wait_for

from tandem.client import Client, SamplingOptions, TextPiece
from tandem.errors import Unavailable
from tandem.volume import Volume
from tandem.wire.oip import grpc_service_pb2, grpc_service_pb2_grpc
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

CLASSIFY = "tandem.v1.Inference/Classify"
GENERATE = "tandem.v1.Inference/Generate"
SPAN_ID = "b7ad6b7169203331"


@dataclass
class Collector:
    """An OpenTelemetry collector, as far as it is asked to take spans over HTTP."""

    spans: list[Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            self.services |= {
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            }
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def of(self, trace_id: str, num_spans: int) -> dict[str, Span]:
        """Return the spans of a trace by their names, once there are so many."""

        def found() -> list[Span]:
            return [span for span in self.spans if span.trace_id.hex() == trace_id]

        wait_for(lambda: len(found()) >= num_spans)
        assert len(found()) == num_spans
        return {span.name: span for span in found()}

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[ServerProcess]:
    """A server that tells everything, with a classifier `pictures` and a language model `words`."""
    directory = tmp_path_factory.mktemp("operations")
    volume = Volume(directory / "home")
    publish_classifier(volume, "pictures", "run-c")
    publish_language_model(volume, "words", "run-l")
    told = {"TANDEM_METRICS_LISTEN": "127.0.0.1:0", "TANDEM_LOG_FORMAT": "json", "TANDEM_SLOW_REQUEST_MS": "0.001"}
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    server = start_server(directory, volume, TANDEM_ENGINE="eager", **told, **traced)
    try:
        with Client(server.address) as client:
            for model in ("pictures", "words"):
                client.wait_until_serving(model, timeout_s=PATIENCE_S)
                client.get_model(model)
        yield server
        assert server.stop() == 0
    finally:
        server.kill()
    # Every line, to the last.
    for line in server.log.read_text().splitlines():
        assert {"at", "level", "logger", "message"} <= set(json.loads(line))


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]


def scrape(server: ServerProcess) -> dict[tuple[str, ...], float]:
    """Return the samples by their names and the values of their labels."""
    (address,) = re.findall(r"metrics on (http://127\.0\.0\.1:\d+/metrics)", server.log.read_text())
    with urlopen(address, timeout=240) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert len({family.name for family in families}) == len(families)
    return {
        (each.name.removeprefix("tandem_inference_"), *(value for _, value in sorted(each.labels.items()))): each.value
        for family in families
        for each in family.samples
    }


def images(*numbers: int, model: str = "pictures") -> pb.ClassifyRequest:
    return pb.ClassifyRequest(model=model, images=[pb.Image(data=png(number)) for number in numbers])


def text(num_words: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="words", prompt="the cat", sampling=pb.SamplingParameters(max_words=num_words, seed=1)
    )


def test_metrics_count_what_was_done(server: ServerProcess, stub: Any) -> None:
    before = scrape(server)
    stub.Classify(images(0, 1, 2))
    stub.Compare(pb.CompareRequest(model_a="pictures", model_b="pictures", images=[pb.Image(data=png(0))]))
    list(stub.Generate(text(50)))
    for name in ("made-up-1", "made-up-2"):
        with pytest.raises(grpc.RpcError):
            stub.Classify(images(0, model=name))

    def more(*key: str) -> float:
        return found[key] - before.get(key, 0.0)

    # A call is noted after its answer has gone out.
    wait_for(lambda: scrape(server).get(("grpc_server_call_duration_seconds_count", "NOT_FOUND", CLASSIFY)) == 2)
    found = scrape(server)
    # A comparison counts for both of its models.
    assert more("request_success_total", "pictures", "1") == 3
    assert more("count_total", "pictures", "1") == 5
    assert more("exec_count_total", "pictures", "1") == 3
    assert more("request_duration_seconds_count", "pictures", "1") == 3
    assert more("request_duration_seconds_sum", "pictures", "1") >= more(
        "compute_duration_seconds_sum", "pictures", "1"
    )
    assert more("generation_tokens_total", "words", "1") == 50
    assert more("prompt_tokens_total", "words", "1") == 2
    assert more("time_to_first_token_seconds_count", "words", "1") == 1
    assert more("time_between_tokens_seconds_count", "words", "1") == 49
    assert found["num_requests_running", "words", "1"] == found["num_requests_waiting", "words", "1"] == 0
    assert more("grpc_server_call_duration_seconds_count", "OK", CLASSIFY) == 1
    assert more("grpc_server_call_duration_seconds_count", "OK", GENERATE) == 1
    assert found["models_loaded",] == found["model_load_duration_seconds_count",] == 2
    assert found["process_cpu_seconds_total",] > 0
    assert not any("made-up" in part for key in found for part in key)


def test_a_classification_is_a_trace_of_its_caller(stub: Any, collector: Collector) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    stub.Classify(images(0, 1), metadata=[("traceparent", f"00-{trace_id}-{SPAN_ID}-01")])
    spans = collector.of(trace_id, 4)
    call = spans[CLASSIFY]
    assert (call.kind, call.parent_span_id.hex()) == (Span.SPAN_KIND_SERVER, SPAN_ID)
    assert {
        "rpc.system.name": "grpc",
        "rpc.method": CLASSIFY,
        "rpc.response.status_code": "OK",
        "network.peer.address": "127.0.0.1",
        "tandem.num_items": 2,
    }.items() <= attributes(call).items()
    for name in ("decode", "queue", "compute"):
        assert spans[name].parent_span_id == call.span_id
        # The times of queue and compute are those of the device's thread, told in milliseconds.
        assert call.start_time_unix_nano <= spans[name].start_time_unix_nano + 1_000_000
        assert spans[name].end_time_unix_nano <= call.end_time_unix_nano
    assert spans["decode"].end_time_unix_nano <= spans["compute"].start_time_unix_nano
    assert collector.services == {"tandem-inference"}


def test_a_text_is_a_trace_with_its_tokens(stub: Any, collector: Collector) -> None:
    trace_id = "1af7651916cd43dd8448eb211c80319c"
    list(stub.Generate(text(30), metadata=[("traceparent", f"00-{trace_id}-{SPAN_ID}-01")]))
    spans = collector.of(trace_id, 3)
    assert set(spans) == {GENERATE, "prefill", "decode"}
    told = attributes(spans[GENERATE])
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (2, 30)
    assert attributes(spans["decode"])["tandem.num_tokens"] == 30
    assert spans["prefill"].end_time_unix_nano <= spans["decode"].start_time_unix_nano


def test_an_error_of_the_caller_is_none_of_the_server_and_unsampled_calls_are_left_out(
    stub: Any, collector: Collector
) -> None:
    wrong, unsampled = ("2af7651916cd43dd8448eb211c80319c", "3af7651916cd43dd8448eb211c80319c")
    stub.Classify(images(0), metadata=[("traceparent", f"00-{unsampled}-{SPAN_ID}-00")])
    with pytest.raises(grpc.RpcError):
        stub.Classify(images(0, model="absent"), metadata=[("traceparent", f"00-{wrong}-{SPAN_ID}-01")])
    (span,) = collector.of(wrong, 1).values()
    assert attributes(span)["rpc.response.status_code"] == "NOT_FOUND"
    assert span.status.code == 0
    assert not any(each.trace_id.hex() == unsampled for each in collector.spans)


def test_a_slow_call_is_in_the_log_without_its_contents(server: ServerProcess, stub: Any) -> None:
    trace_id = "4af7651916cd43dd8448eb211c80319c"
    prompt = "a most secret prompt"
    request = pb.GenerateRequest(model="words", prompt=prompt, sampling=pb.SamplingParameters(max_words=3, seed=1))
    list(stub.Generate(request, metadata=[("traceparent", f"00-{trace_id}-{SPAN_ID}-01")]))

    def found() -> list[dict[str, Any]]:
        documents = [json.loads(line) for line in server.log.read_text().splitlines()]
        return [each for each in documents if each.get("trace_id") == trace_id]

    # There is room for a line each second, at the latest.
    wait_for(
        lambda: found() or not list(stub.Generate(request, metadata=[("traceparent", f"00-{trace_id}-{SPAN_ID}-01")])),
    )
    document = found()[0]
    assert (document["logger"], document["model"], document["code"]) == ("tandem.inference.slow", "words:1", "OK")
    assert (document["method"], document["num_tokens"]) == (GENERATE, 3)
    assert document["total_ms"] >= document["compute_ms"] > 0
    assert document["peer"].startswith("ipv4:127.0.0.1:")
    assert "secret" not in server.log.read_text()


def start(directory: Path, **changes: str) -> ServerProcess:
    volume = Volume(directory / "home")
    publish_classifier(volume, "pictures", "run-c")
    publish_language_model(volume, "words", "run-l")
    server = start_server(directory, volume, TANDEM_ENGINE="eager", **changes)
    with Client(server.address) as client:
        for model in ("pictures", "words"):
            client.wait_until_serving(model, timeout_s=PATIENCE_S)
            client.get_model(model)
    return server


def test_without_its_collector_calls_are_answered_and_the_server_ends_in_time(tmp_path: Path) -> None:
    # Nothing listens there.
    server = start(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", OTEL_BSP_SCHEDULE_DELAY="50")
    try:
        with Client(server.address, timeout_s=20) as client:
            for number in range(20):
                assert not client.classify("pictures", [png(number)]).results[0].error
        assert server.stop() == 0
    finally:
        server.kill()
    assert "traces go to http://127.0.0.1:1/v1/traces" in server.log.read_text()


def test_who_wants_neither_metrics_nor_traces_does_not_import_them() -> None:
    # redis-py imports a part of OpenTelemetry's SDK wherever it is installed.
    names = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "prometheus_client", "requests")
    imported = f"[name for name in {names} if name in sys.modules]"
    program = f"import sys, services.inference.server; print({imported})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@dataclass
class Load:
    """Callers without a pause; what a call ends with other than an answer is kept."""

    address: str
    num_answers: int = 0
    failures: list[grpc.RpcError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.call) for _ in range(4)]
        for thread in self.threads:
            thread.start()

    def call(self) -> None:
        # As the documentation of gRPC has it: a call that the server has not begun is tried again.
        policy = {"maxAttempts": 5, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2}
        # CANCELLED too: what gRPC has received and not yet handed to Python when it stops ends so.
        policy["retryableStatusCodes"] = ["UNAVAILABLE", "CANCELLED"]
        config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})
        options = [("grpc.service_config", config), ("grpc.initial_reconnect_backoff_ms", 50)]
        with grpc.insecure_channel(self.address, options=[*options, ("grpc.max_reconnect_backoff_ms", 200)]) as channel:
            stub: Any = rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            while not self.stopped.is_set():
                try:
                    stub.Classify(images(0), timeout=240, wait_for_ready=True)
                    self.num_answers += 1
                except grpc.RpcError as error:
                    self.failures.append(error)

    def stop(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(70)


def test_a_restart_under_load_fails_no_call(tmp_path: Path, tried: "Counter[str]") -> None:
    first = start(tmp_path / "one", TANDEM_DRAIN_DELAY_S="0.5")
    load, second = Load(first.address), None
    try:
        wait_for(lambda: load.num_answers > 10)
        first.process.send_signal(signal.SIGTERM)
        at_the_signal = load.num_answers
        # Not ready any more, and serving on.
        wait_for(lambda: load.num_answers > at_the_signal)
        assert first.process.wait(240) == 0
        before = load.num_answers
        second = start_server(tmp_path / "two", first.volume, first.address, TANDEM_ENGINE="eager")
        wait_for(lambda: load.num_answers > before + 10)
    finally:
        load.stop()
        for server in (first, second):
            if server is not None:
                server.kill()
    assert [(failure.code(), failure.details()) for failure in load.failures] == []
    tried["SIGTERM of the server under load"] += 1


def test_a_server_that_drains_is_not_ready_and_serves_on(tmp_path: Path) -> None:
    server = start(tmp_path, TANDEM_DRAIN_DELAY_S="60")
    try:
        with grpc.insecure_channel(server.address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            oip: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            stub: Any = rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]

            def ready() -> list[bool]:
                statuses = [
                    health.Check(health_pb2.HealthCheckRequest(service=name)).status for name in ("", "models/words")
                ]
                said = oip.ServerReady(grpc_service_pb2.ServerReadyRequest()).ready
                return [*(status == health_pb2.HealthCheckResponse.SERVING for status in statuses), said]

            assert ready() == [True, True, True]
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: ready() == [False, False, False])
            assert len(stub.Classify(images(0)).results) == 1
            assert server.process.poll() is None
            # A second signal ends it at once.
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(120) == 128 + signal.SIGTERM
    finally:
        server.kill()
    assert "told to stop a second time" in server.log.read_text()


def test_a_text_without_end_is_told_that_the_server_stops(tmp_path: Path) -> None:
    server = start(tmp_path, TANDEM_DRAIN_GRACE_S="0.5")
    try:
        with Client(server.address) as client:
            steps = client.generate("words", None, 100_000, SamplingOptions(seed=1))
            assert isinstance(next(steps), TextPiece)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(Unavailable, match="the server is stopping and gave this call up"):
                for _ in steps:
                    pass
            assert server.process.wait(120) == 0
    finally:
        server.kill()
    log = server.log.read_text()
    assert "calls given up after 0.5 s: 1" in log
    assert "Traceback" not in log
