"""What an operator gets of calls: records, slow calls, texts, metrics; without a server."""

import asyncio
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
import torch
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from services.inference.admission import REASONS, Limits
from services.inference.counts import CallCounts, LoadCounts
from services.inference.devices import Devices
from services.inference.draining import DELAY_S, patience
from services.inference.durations import BOUNDS_S, Durations
from services.inference.metrics import ServerMetrics, make_registry
from services.inference.observation import MAX_STEPS, Observed, Observer, current_call
from services.inference.scheduler import DeviceScheduler
from services.inference.slow_calls import BURST, CallFields, SlowCalls
from services.inference.statistics import ModelStatistics, Passage
from services.inference.telemetry import are_traces_wanted
from services.inference.text_statistics import TextPassage, TextStatistics
from tandem.errors import CheckpointCorrupt, DeadlineExceeded, InvalidRequest, QueueFull
from tandem.logs import JsonFormatter
from tandem.settings import Settings

CLASSIFY = "tandem.v1.Inference/Classify"
GENERATE = "tandem.v1.Inference/Generate"
TRACE = "0af7651916cd43dd8448eb211c80319c"


def ended(total_s: float, code: str = "OK", method: str = CLASSIFY, **facts: Any) -> Observed:
    return Observed(method, 10.0, ended_at=10.0 + total_s, code=code, **facts)


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    found: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler, log = Handler(), logging.getLogger("tandem.inference.slow")
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)


def test_a_duration_is_in_the_bucket_that_it_fits() -> None:
    durations = Durations()
    for seconds in (0.0, 0.00025, 0.0003, 30.0, 31.0):
        durations.add(seconds)
    durations.add(0.002, times=3)
    assert durations.count == sum(durations.within) == 8
    assert durations.ns == pytest.approx((61.00055 + 0.006) * 1e9)
    assert (durations.within[0], durations.within[1], durations.within[-2], durations.within[-1]) == (2, 1, 1, 1)
    assert durations.within[BOUNDS_S.index(0.0025)] == 3
    before = durations.copy()
    durations.add(1.0)
    assert (before.count, sum(before.within)) == (8, 8)


def test_a_slow_call_is_one_line_that_says_where_the_time_went(records: list[logging.LogRecord]) -> None:
    slow = SlowCalls(1000.0, lambda: 0.0)
    slow(ended(0.999))
    slow(
        ended(1.5, models=["tiny:3"], num_items=32, decode_s=0.003, queue_s=1.4, compute_s=0.09, peer="ipv4:1.2.3.4:5")
    )
    slow(ended(0.1, "DEADLINE_EXCEEDED"))
    slow(ended(9.0, method="grpc.health.v1.Health/Watch"))
    # A text may take its time; the first word may not.
    slow(ended(60.0, method=GENERATE, is_stream=True, first_answer_at=10.2))
    slow(ended(60.0, method=GENERATE, is_stream=True, first_answer_at=12.0, num_tokens=100, num_prompt_tokens=3))
    first, late, text = (json.loads(JsonFormatter().format(record)) for record in records)
    expected = {"method": CLASSIFY, "model": "tiny:3", "code": "OK", "num_items": 32, "peer": "ipv4:1.2.3.4:5"}
    expected |= {"decode_ms": 3.0, "queue_ms": 1400.0, "compute_ms": 90.0, "total_ms": 1500.0, "num_left_out": 0}
    assert expected.items() <= first.items()
    assert re.fullmatch("[0-9a-f]{8}", first["call_id"])
    assert "queue_ms=1400.0" in first["message"]
    assert late["code"] == "DEADLINE_EXCEEDED"
    assert "model" not in late
    assert (text["first_answer_ms"], text["num_tokens"], text["num_prompt_tokens"]) == (2000.0, 100, 3)


def test_slow_calls_are_logged_so_often_and_no_more(records: list[logging.LogRecord]) -> None:
    now = 0.0
    slow = SlowCalls(1.0, lambda: now)
    for _ in range(BURST + 50):
        slow(ended(1.0))
    assert len(records) == BURST
    now = 1.0
    slow(ended(1.0))
    slow(ended(1.0))
    assert len(records) == BURST + 1
    assert cast(Any, records[-1]).fields["num_left_out"] == 50


def test_only_a_trace_id_of_the_right_form_comes_into_the_log(records: list[logging.LogRecord]) -> None:
    slow = SlowCalls(1.0)
    slow(ended(1.0, traceparent=f"00-{TRACE}-b7ad6b7169203331-01"))
    slow(ended(1.0, traceparent="00-a secret of the caller-b7ad6b7169203331-01"))
    right, wrong = (cast(Any, record).fields for record in records)
    assert right["trace_id"] == TRACE
    assert "secret" not in str(wrong)


class Context:
    """A call's context, as far as an observer asks for it."""

    def __init__(self, remaining_s: float | None = None) -> None:
        self._code: Any = 0
        self._remaining_s = remaining_s

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    def code(self) -> Any:
        return self._code

    def time_remaining(self) -> float | None:
        return self._remaining_s

    async def abort(self, code: grpc.StatusCode, details: str = "", metadata: Any = ()) -> None:
        self._code = code
        raise grpc.aio.AbortError(details)


async def handler_of(observer: Observer, handler: Any, method: str = CLASSIFY, metadata: Any = ()) -> Any:
    async def continuation(_: object) -> Any:
        return handler

    return await observer.intercept_service(
        continuation, cast(Any, SimpleNamespace(method=f"/{method}", invocation_metadata=metadata))
    )


async def told(listened: list[Observed]) -> Observed:
    await asyncio.sleep(0)
    (call,) = listened
    listened.clear()
    return call


async def test_a_call_is_told_of_once_it_has_ended_whatever_its_end() -> None:
    listened: list[Observed] = []
    observer = Observer([listened.append])

    async def succeed(request: Any, context: Any) -> str:
        call = current_call()
        assert call is not None
        Passage([ModelStatistics(label="tiny:1")]).end(3, None)
        return "answer"

    async def refuse(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no")

    async def late(request: Any, context: Any) -> None:
        raise asyncio.CancelledError

    async def broken(request: Any, context: Any) -> None:
        raise ValueError

    unary = grpc.unary_unary_rpc_method_handler
    wrapped = await handler_of(observer, unary(succeed), metadata=(("traceparent", "x"), ("other", "y")))
    assert await wrapped.unary_unary(None, Context()) == "answer"
    call = await told(listened)
    assert (call.method, call.code, call.models, call.num_items) == (CLASSIFY, "OK", ["tiny:1"], 3)
    assert (call.traceparent, call.peer, call.is_stream) == ("x", "ipv4:127.0.0.1:5", False)
    cases: list[tuple[Any, float | None, type[BaseException], str]] = [
        (refuse, None, grpc.aio.AbortError, "NOT_FOUND"),
        (late, 1.0, asyncio.CancelledError, "CANCELLED"),
        (late, 0.0, asyncio.CancelledError, "DEADLINE_EXCEEDED"),
        (broken, None, ValueError, "UNKNOWN"),
    ]
    for behaviour, remaining_s, error, code in cases:
        wrapped = await handler_of(observer, unary(behaviour))
        with pytest.raises(error):
            await wrapped.unary_unary(None, Context(remaining_s))
        assert (await told(listened)).code == code
    assert observer.num_active == 0


async def test_streams_of_either_kind_are_observed() -> None:
    listened: list[Observed] = []
    observer = Observer([listened.append])

    async def yielding(request: Any, context: Any) -> AsyncIterator[int]:
        yield 1
        yield 2

    async def writing(request: Any, context: Any) -> None:
        return None

    wrapped = await handler_of(observer, grpc.unary_stream_rpc_method_handler(yielding), GENERATE)
    assert [each async for each in wrapped.unary_stream(None, Context())] == [1, 2]
    call = await told(listened)
    assert call.is_stream
    assert call.first_answer_at is not None
    wrapped = await handler_of(observer, grpc.stream_stream_rpc_method_handler(writing), GENERATE)
    await wrapped.stream_stream(None, Context())
    assert (await told(listened)).code == "OK"


async def test_a_listener_that_fails_fails_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    listened: list[Observed] = []

    def fail(call: Observed) -> None:
        raise ValueError("a bug")

    async def succeed(request: Any, context: Any) -> str:
        return "answer"

    wrapped = await handler_of(Observer([fail, listened.append]), grpc.unary_unary_rpc_method_handler(succeed))
    assert await wrapped.unary_unary(None, Context()) == "answer"
    await told(listened)
    assert "a call could not be noted" in caplog.text


async def test_calls_that_are_given_up_end_unavailable() -> None:
    listened: list[Observed] = []
    observer, begun = Observer([listened.append]), asyncio.Event()

    async def endless(request: Any, context: Any) -> None:
        begun.set()
        await asyncio.sleep(60)

    await asyncio.wait_for(observer.idle(), 120)
    wrapped = await handler_of(observer, grpc.unary_unary_rpc_method_handler(endless))
    task = asyncio.create_task(wrapped.unary_unary(None, Context()))
    await begun.wait()
    waiting = asyncio.create_task(observer.idle())
    await asyncio.sleep(0)
    assert observer.num_active == 1
    observer.end_all()
    with pytest.raises(grpc.aio.AbortError, match="the server is stopping and gave this call up"):
        await task
    await asyncio.wait_for(waiting, 120)
    assert (await told(listened)).code == "UNAVAILABLE"


def test_records_within_a_call_say_which() -> None:
    from services.inference import observation

    record = logging.LogRecord("tandem", logging.INFO, "", 1, "text", (), None)
    CallFields().filter(record)
    assert "call_id" not in json.loads(JsonFormatter().format(record))
    call = ended(1.0, models=["tiny:1"])
    token = observation._current.set(call)
    try:
        cast(Any, record).fields = {"error_id": "ab"}
        CallFields().filter(record)
    finally:
        observation._current.reset(token)
    found = json.loads(JsonFormatter().format(record))
    assert (found["call_id"], found["model"], found["error_id"]) == (call.call_id, "tiny:1", "ab")


def test_the_steps_of_a_call_are_bounded() -> None:
    call = ended(1.0)
    for number in range(MAX_STEPS + 5):
        call.add_step("compute", number, number + 1)
    assert (len(call.steps), call.num_steps_left_out) == (MAX_STEPS, 5)


def test_a_text_counts_its_tokens_and_the_waits_for_them() -> None:
    texts, call = TextStatistics(), ended(1.0)
    first, second = TextPassage(texts, 5, begun_at=0.0, call=call), TextPassage(texts, 0, begun_at=0.0)
    assert (texts.num_waiting, texts.num_running, texts.num_prompt_tokens) == (2, 0, 5)
    first.prefilled()
    first.drew(0)
    assert (texts.num_waiting, texts.num_running, texts.first_token.count) == (1, 1, 0)
    first.drew(1)
    first.drew(3)
    second.drew(4)
    assert (texts.num_waiting, texts.num_running, texts.num_tokens) == (0, 2, 8)
    # The first token of each; the rest come between.
    assert (texts.first_token.count, texts.between_tokens.count) == (2, 6)
    first.end()
    second.end()
    TextPassage(texts, 1, begun_at=0.0).end()
    assert (texts.num_waiting, texts.num_running) == (0, 0)
    assert [(step.name, step.num_tokens) for step in call.steps] == [("prefill", 0), ("decode", 4)]
    assert (call.num_prompt_tokens, call.num_tokens) == (5, 4)


class Doubling:
    """A runtime whose logits are two for each pixel's value."""

    def predict(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float()[:, :2] * 2


class Models:
    """A registry that has what it is told to have in memory."""

    def __init__(self, *served: Any) -> None:
        self.served = list(served)

    def loaded(self) -> tuple[Any, ...]:
        return tuple(self.served)


def served(name: str, version: int, runtime: object) -> Any:
    located = SimpleNamespace(version=SimpleNamespace(name=name, version=version), label=f"{name}:{version}")
    made = SimpleNamespace(located=located, runtime=runtime, runtimes=(runtime,))
    # On the only device.
    made.on = lambda number: made
    return made


@pytest.fixture
def scheduler() -> Iterator[DeviceScheduler]:
    scheduler = DeviceScheduler(torch.device("cpu"), limits=Limits(items=4, model_items=3))
    yield scheduler
    scheduler.close()


def scrape(metrics: ServerMetrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(generate_latest(make_registry(metrics)).decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix("tandem_inference_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


async def test_a_scrape_tells_of_the_models_in_memory_and_of_no_others(scheduler: DeviceScheduler) -> None:
    runtime, pixels = Doubling(), torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    models = Models(served("tiny", 2, runtime))
    metrics = ServerMetrics(cast(Any, models), Devices([scheduler]), CallCounts(), LoadCounts())
    scheduler.begin_statistics(runtime, label="tiny:2")
    with scheduler.admit(3, runtime) as place:
        await place.predict(runtime, pixels)
        with pytest.raises(QueueFull), scheduler.admit(1, runtime):
            pass
    with pytest.raises(DeadlineExceeded), scheduler.admit(1, runtime) as place:
        raise DeadlineExceeded("late")
    found, labels = scrape(metrics), '{model="tiny",version="2"}'
    assert found[f"request_success_total{labels}"] == 1
    assert found[f"count_total{labels}"] == 3
    assert found[f"exec_count_total{labels}"] == 1
    for code in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"):
        assert found[f'request_failure_total{{code="{code}",model="tiny",version="2"}}'] == 1
    for part in ("request", "queue", "decode", "compute"):
        assert found[f"{part}_duration_seconds_count{labels}"] == 1
        assert found[f'{part}_duration_seconds_bucket{{le="+Inf",model="tiny",version="2"}}'] == 1
    assert found['batch_size_bucket{le="2.0",model="tiny",version="2"}'] == 0
    assert found['batch_size_bucket{le="4.0",model="tiny",version="2"}'] == 1
    assert found[f"batch_size_sum{labels}"] == 3
    assert {reason: found[f'queue_refusals_total{{reason="{reason}"}}'] for reason in REASONS} == {
        **dict.fromkeys(REASONS, 0),
        "model_items": 1,
    }
    assert found["models_loaded"] == 1
    assert found["process_resident_memory_bytes"] > 0
    assert not any(name.startswith("generation_tokens_total") for name in found)
    models.served.clear()
    assert not any("tiny" in name for name in scrape(metrics))


async def test_what_waits_for_the_device_is_told(scheduler: DeviceScheduler) -> None:
    runtime, opened = Doubling(), threading.Event()
    metrics = ServerMetrics(
        cast(Any, Models(served("tiny", 1, runtime))), Devices([scheduler]), CallCounts(), LoadCounts()
    )
    holding = asyncio.create_task(scheduler.run(lambda: opened.wait(60)))
    await asyncio.sleep(0)
    with scheduler.admit(2, runtime, num_bytes=96) as place, scheduler.admit(1, runtime, stream=True):
        asking = asyncio.create_task(place.predict(runtime, torch.zeros(2, 3, 4, 4, dtype=torch.uint8)))
        try:
            async with asyncio.timeout(10):
                while scheduler.num_waiting < 2:
                    await asyncio.sleep(0.01)
            found = scrape(metrics)
        finally:
            opened.set()
            await asyncio.gather(holding, asking)
    assert found['pending_request_count{model="tiny",version="1"}'] == 1
    assert found['pending_items{model="tiny",version="1"}'] == 2
    assert (found["admitted_items"], found["admitted_bytes"], found["admitted_streams"]) == (3, 96, 1)


async def test_two_runtimes_of_a_model_count_together(scheduler: DeviceScheduler) -> None:
    fast, eager = Doubling(), Doubling()
    scheduler.begin_statistics(fast, eager, label="tiny:1")
    for runtime in (fast, eager):
        with scheduler.admit(1, runtime):
            pass
    assert scheduler.statistics(fast).success.count == scheduler.statistics(eager).success.count == 2


async def test_loads_are_counted_by_how_they_end() -> None:
    loads = LoadCounts()

    async def load(error: Exception | None = None) -> int:
        if error is not None:
            raise error
        return 7

    assert await loads.count(load()) == 7
    with pytest.raises(CheckpointCorrupt):
        await loads.count(load(CheckpointCorrupt("torn")))
    assert (loads.seconds.count, loads.num_failures) == (1, 1)


def test_calls_are_counted_by_method_and_code(scheduler: DeviceScheduler) -> None:
    calls = CallCounts()
    for call in (ended(0.1), ended(0.2), ended(0.1, "NOT_FOUND"), ended(0.1, method=GENERATE)):
        calls(call)
    found = scrape(ServerMetrics(cast(Any, Models()), Devices([scheduler]), calls, LoadCounts()))
    name = "grpc_server_call_duration_seconds_count"
    assert found[f'{name}{{code="OK",method="{CLASSIFY}"}}'] == 2
    assert found[f'{name}{{code="NOT_FOUND",method="{CLASSIFY}"}}'] == 1
    assert found[f'{name}{{code="OK",method="{GENERATE}"}}'] == 1


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces_are_off_unless_a_collector_is_named(environment: dict[str, str], wanted: bool) -> None:
    assert are_traces_wanted(environment) is wanted


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_TRACES_EXPORTER", "zipkin")]
)
def test_what_we_do_not_speak_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}='{value}'"):
        are_traces_wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", name: value})


def test_the_settings_of_stopping_and_slowness() -> None:
    settings = Settings.from_environment({})
    assert (settings.drain_delay_s, settings.drain_grace_s, settings.slow_request_ms) == (None, 5.0, 1000.0)
    assert patience("127.0.0.1", None, 5.0).delay_s == 0.0
    assert patience("0.0.0.0", None, 5.0).delay_s == DELAY_S
    assert patience("0.0.0.0", 1.5, 5.0).delay_s == 1.5
    given = Settings.from_environment({"TANDEM_DRAIN_DELAY_S": "0", "TANDEM_SLOW_REQUEST_MS": "0"})
    assert (given.drain_delay_s, given.slow_request_ms) == (0.0, 0.0)
    for name, value in (
        ("TANDEM_DRAIN_DELAY_S", "-1"),
        ("TANDEM_SLOW_REQUEST_MS", "inf"),
        ("TANDEM_DRAIN_GRACE_S", "0"),
    ):
        with pytest.raises(InvalidRequest, match=f"{name}='{value}' is not a number of"):
            Settings.from_environment({name: value})
