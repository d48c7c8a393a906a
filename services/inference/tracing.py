"""Traces: each call becomes spans when it has ended, and a thread of the SDK sends them.

Nothing is done for them while a call runs but noting times, which the record of the call does anyway. A collector that
is slow or gone costs the spans that its queue has no room for, and no call.
"""

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.inference.observation import Observed, Step
from tandem import __version__

SERVICE = "tandem-inference"
# What is left to send when the server ends gets no longer.
CLOSE_S = 2.0
# By the semantic conventions, of a server: errors of the caller are none of it.
_ERRORS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}


class Traces:
    """An Observer's listener that makes spans of calls; the SDK reads the OTEL_* variables of the process itself."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.endpoint = _endpoint(environment)
        self._provider = TracerProvider(resource=Resource.create(_own_name(environment)), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(self.endpoint)))
        self._tracer = self._provider.get_tracer("tandem.inference", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, call: Observed) -> None:
        """Make spans of `call`: one of the server, and one for each of its steps."""
        # The wall clock of now, so that the spans of a call fit together whatever it did in the meantime.
        zero_ns = time.time_ns() - time.monotonic_ns()
        carrier = {"traceparent": call.traceparent, "tracestate": call.tracestate}
        parent = self._propagator.extract(carrier, Context()) if call.traceparent else Context()
        span = self._tracer.start_span(
            call.method, parent, SpanKind.SERVER, _attributes(call), start_time=_ns(zero_ns, call.begun_at)
        )
        if call.code in _ERRORS:
            span.set_status(StatusCode.ERROR)
        within = set_span_in_context(span, parent)
        for step in call.steps if span.is_recording() else ():
            self._add_step(step, within, zero_ns)
        span.end(_ns(zero_ns, call.ended_at))

    async def close(self) -> None:
        """Send what is left, for CLOSE_S at most."""
        # A daemon: where nobody answers, the process does not wait for it.
        thread = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, CLOSE_S)

    def _add_step(self, step: Step, within: Context, zero_ns: int) -> None:
        attributes = {"tandem.num_tokens": step.num_tokens} if step.num_tokens else None
        span = self._tracer.start_span(
            step.name, within, SpanKind.INTERNAL, attributes, start_time=_ns(zero_ns, step.begun_at)
        )
        span.end(_ns(zero_ns, step.ended_at))


def _endpoint(environment: Mapping[str, str]) -> str:
    given = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return given or environment["OTEL_EXPORTER_OTLP_ENDPOINT"].rstrip("/") + "/v1/traces"


def _own_name(environment: Mapping[str, str]) -> dict[str, str]:
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return {} if named else {SERVICE_NAME: SERVICE}


def _attributes(call: Observed) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "rpc.system.name": "grpc",
        "rpc.method": call.method,
        "rpc.response.status_code": call.code,
        "tandem.call_id": call.call_id,
    }
    if call.code in _ERRORS:
        attributes["error.type"] = call.code
    if call.models:
        attributes |= {"tandem.models": call.models, "tandem.num_items": call.num_items}
    if call.num_tokens or call.num_prompt_tokens:
        attributes["gen_ai.usage.input_tokens"] = call.num_prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = call.num_tokens
    if call.error_id:
        attributes["tandem.error_id"] = call.error_id
    if call.num_steps_left_out:
        attributes["tandem.num_steps_left_out"] = call.num_steps_left_out
    return attributes | _peer(call.peer)


def _peer(peer: str) -> dict[str, Any]:
    """Return the address of `ipv4:127.0.0.1:80` or `ipv6:%5B::1%5D:80`."""
    kind, _, rest = peer.partition(":")
    address, _, port = rest.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return {}
    address = address.removeprefix("%5B").removeprefix("[").removesuffix("%5D").removesuffix("]")
    return {"network.peer.address": address, "network.peer.port": int(port)}


def _ns(zero_ns: int, at: float) -> int:
    return zero_ns + round(at * 1e9)
