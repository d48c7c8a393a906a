"""/metrics over HTTP, for whichever service has metrics: a thread answers, and what is asked is collected then."""

import logging
from collections.abc import Sequence
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric

from tandem.errors import Conflict
from tandem.gpus import Reading

log = logging.getLogger(__name__)


def serve_metrics(listen: tuple[str, int], registry: CollectorRegistry) -> WSGIServer:
    """Answer scrapes of `registry` at host and port (0: any free one) in a thread; raise Conflict if it can't be bound.

    A child that is forked later inherits the socket and is to close it.
    """
    host, port = listen
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        reason = error.strerror or str(error)
        raise Conflict(f"can't serve metrics on {host}:{port}: {reason}; set TANDEM_METRICS_LISTEN anew") from error
    log.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, server.server_port)
    return server


def gpu_metrics(readings: Sequence[Reading]) -> list[Metric]:
    """Return what GPUs said just now."""
    labels = ["gpu", "name"]
    memory = GaugeMetricFamily("tandem_gpu_memory_bytes", "Memory of the GPU", labels=labels)
    used = GaugeMetricFamily("tandem_gpu_memory_used_bytes", "Memory in use", labels=labels)
    busy = GaugeMetricFamily("tandem_gpu_utilization_ratio", "Share of time in which it computed", labels=labels)
    for reading in readings:
        values = [str(reading.gpu.index), reading.gpu.name]
        memory.add_metric(values, reading.gpu.memory_bytes)
        if reading.memory_used_bytes is not None:
            used.add_metric(values, reading.memory_used_bytes)
        if reading.utilization is not None:
            busy.add_metric(values, reading.utilization)
    return [memory, used, busy]
