"""What an operator gets of the server while it runs: slow calls in the log, Prometheus, traces."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping

from services.inference.counts import CallCounts
from services.inference.engine import Engine
from services.inference.observation import Observer
from services.inference.slow_calls import SlowCalls
from tandem.errors import InvalidRequest
from tandem.settings import Settings

_PROTOCOL = "http/protobuf"

log = logging.getLogger("tandem.inference")


@contextlib.asynccontextmanager
async def telling(
    settings: Settings, engine: Engine, observer: Observer, environment: Mapping[str, str] = os.environ
) -> AsyncIterator[None]:
    """Tell of the calls that `observer` sees as `settings` and the OTEL_* variables want it, within the context.

    Raises Conflict for an address in use, InvalidRequest for what is asked for and not there.
    """
    if settings.slow_request_ms:
        observer.listeners.append(SlowCalls(settings.slow_request_ms))
    async with _metrics(settings, engine, observer), _traces(observer, environment):
        yield


@contextlib.asynccontextmanager
async def _metrics(settings: Settings, engine: Engine, observer: Observer) -> AsyncIterator[None]:
    if settings.metrics_listen is None:
        yield
        return
    # Here, since who wants none need not wait for the import.
    from services.inference.metrics import ServerMetrics, make_registry
    from tandem.exposition import serve_metrics
    from tandem.gpus import read_gpus

    calls = CallCounts()
    observer.listeners.append(calls)
    metrics = ServerMetrics(engine.models, engine.devices, calls, engine.loads, read_gpus, engine.shadows.all)
    server = serve_metrics(settings.metrics_listen, make_registry(metrics))
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


@contextlib.asynccontextmanager
async def _traces(observer: Observer, environment: Mapping[str, str]) -> AsyncIterator[None]:
    if not are_traces_wanted(environment):
        yield
        return
    # Here, since it takes as long as a quarter of torch.
    from services.inference.tracing import Traces

    traces = Traces(environment)
    observer.listeners.append(traces)
    log.info("traces go to %s", traces.endpoint)
    try:
        yield
    finally:
        await traces.close()


def are_traces_wanted(environment: Mapping[str, str]) -> bool:
    """Say whether the standard variables name a collector; raise InvalidRequest for one that we can't send to."""
    get = environment.get
    endpoint = get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or get("OTEL_EXPORTER_OTLP_ENDPOINT")
    exporter = (get("OTEL_TRACES_EXPORTER") or "otlp").lower()
    if not endpoint or exporter == "none" or (get("OTEL_SDK_DISABLED") or "").lower() == "true":
        return False
    if exporter != "otlp":
        raise InvalidRequest(f"OTEL_TRACES_EXPORTER={exporter!r}: traces go by otlp, or nowhere (none)")
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next((name for name in names if get(name)), "")
    if name and environment[name] != _PROTOCOL:
        raise InvalidRequest(
            f"{name}={environment[name]!r}: spans are sent by {_PROTOCOL} alone; collectors take it on port 4318"
        )
    return True
