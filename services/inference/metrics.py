"""What Prometheus gets of the inference server: read at the scrape from what scheduler and observer have counted.

Nothing is counted here. Models are those in memory, by their names in the
registry: a name that a caller made up is never a label, and what is dropped from memory is no longer told.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from services.inference.counts import CallCounts, LoadCounts
from services.inference.devices import Devices
from services.inference.durations import BOUNDS_S, Durations
from services.inference.loading import Served, ServedLanguageModel
from services.inference.registry import ServingRegistry
from services.inference.shadow import Shadow
from services.inference.statistics import ModelStatistics
from tandem.exposition import gpu_metrics
from tandem.gpus import Reading

PREFIX = "tandem_inference_"
BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)
# Between two families of a scrape its thread sleeps, so that the event loop gets the interpreter's lock: a scrape of
# eight models takes 11 ms of CPU, in pieces of about 2 ms.
PAUSE_S = 0.0002
_MODEL = ("model", "version")


@dataclass(frozen=True)
class Model:
    """One model in memory at the scrape."""

    labels: Sequence[str]
    is_text: bool
    statistics: ModelStatistics
    num_pending_jobs: int
    num_pending_items: int


@dataclass(frozen=True, eq=False)
class ServerMetrics:
    """A collector of the whole server. `read_gpus` raises nothing."""

    models: ServingRegistry
    devices: Devices
    calls: CallCounts
    loads: LoadCounts
    read_gpus: Callable[[], Sequence[Reading]] = tuple
    shadows: Callable[[], Sequence[Shadow]] = tuple

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of one scrape."""
        for family in self._families():
            yield family
            time.sleep(PAUSE_S)

    def _families(self) -> Iterator[Metric]:
        loaded, models = self.models.loaded(), list[Model]()
        for served in loaded:
            models.append(self._model(served))
            time.sleep(PAUSE_S)
        yield from _requests(models)
        yield from _durations(models)
        yield from _texts([each for each in models if each.is_text])
        yield from self._whole(len(loaded))
        yield from _shadows(self.shadows())
        yield from gpu_metrics(self.read_gpus())

    def _model(self, served: Served) -> Model:
        jobs, items = self.devices.pending(served)
        version = served.located.version
        labels = (version.name, str(version.version)) if version else (served.located.label, "")
        statistics = self.devices.statistics(served)
        return Model(labels, isinstance(served, ServedLanguageModel), statistics, jobs, items)

    def _whole(self, num_loaded: int) -> Iterator[Metric]:
        yield _gauge("admitted_items", "Items whose callers have not been answered", [((), self.devices.num_items)])
        yield _gauge("admitted_bytes", "Bytes of their requests", [((), self.devices.num_bytes)])
        yield _gauge("admitted_streams", "Texts whose callers have not been answered", [((), self.devices.num_streams)])
        yield _gauge("models_loaded", "Versions in memory", [((), num_loaded)])
        yield _histogram("model_load_duration_seconds", "Loads that succeeded", (), [((), self.loads.seconds)])
        yield _counter("model_load_failures", "Loads that failed", (), [((), self.loads.num_failures)])
        refusals = [((reason,), count) for reason, count in self.devices.refusals().items()]
        yield _counter("queue_refusals", "Calls not let in, or late in the queue", ("reason",), refusals)
        durations = list(self.calls.durations.items())
        yield _histogram("grpc_server_call_duration_seconds", "Calls, by how they ended", ("method", "code"), durations)


def make_registry(metrics: ServerMetrics) -> CollectorRegistry:
    """Return what a scrape reads: `metrics`, and memory, processor time, start and open files of the process."""
    registry = CollectorRegistry()
    registry.register(metrics)
    ProcessCollector(registry=registry)
    return registry


def _requests(models: Sequence[Model]) -> Iterator[Metric]:
    def each(of: Callable[[ModelStatistics], float]) -> list[tuple[Sequence[str], float]]:
        return [(model.labels, of(model.statistics)) for model in models]

    yield _counter("request_success", "Calls that succeeded", _MODEL, each(lambda counts: counts.success.count))
    failures = [((*model.labels, code), count) for model in models for code, count in model.statistics.codes.items()]
    yield _counter("request_failure", "Calls that did not, by gRPC's code", (*_MODEL, "code"), failures)
    yield _counter("count", "Images or texts of calls that succeeded", _MODEL, each(lambda counts: counts.num_items))
    yield _counter("exec_count", "Batches, or turns of texts", _MODEL, each(lambda counts: counts.num_batches))
    pending = [(model.labels, float(model.num_pending_jobs)) for model in models]
    yield _gauge("pending_request_count", "Requests that wait for the device", pending, _MODEL)
    items = [(model.labels, float(model.num_pending_items)) for model in models]
    yield _gauge("pending_items", "Items that wait for the device", items, _MODEL)


def _durations(models: Sequence[Model]) -> Iterator[Metric]:
    def each(of: Callable[[ModelStatistics], Durations]) -> list[tuple[Sequence[str], Durations]]:
        return [(model.labels, of(model.statistics)) for model in models]

    yield _histogram(
        "request_duration_seconds", "From admission to the end", _MODEL, each(lambda counts: counts.success)
    )
    yield _histogram("queue_duration_seconds", "Waiting for the device", _MODEL, each(lambda counts: counts.queue))
    yield _histogram(
        "decode_duration_seconds", "Until the device is asked", _MODEL, each(lambda counts: counts.compute_input)
    )
    yield _histogram("compute_duration_seconds", "On the device", _MODEL, each(lambda counts: counts.compute_infer))
    yield _batch_sizes(models)


def _batch_sizes(models: Sequence[Model]) -> Metric:
    family = HistogramMetricFamily(PREFIX + "batch_size", "Items of a batch", labels=_MODEL)
    for model in models:
        counts = [0] * (len(BATCH_SIZES) + 1)
        num_items = 0
        for size, total in model.statistics.batches.items():
            counts[bisect_left(BATCH_SIZES, size)] += total.count
            num_items += size * total.count
        family.add_metric(model.labels, _cumulative(BATCH_SIZES, counts), num_items)
    return family


def _texts(models: Sequence[Model]) -> Iterator[Metric]:
    texts = [(model.labels, model.statistics.texts) for model in models]
    running = [(labels, float(each.num_running)) for labels, each in texts]
    waiting = [(labels, float(each.num_waiting)) for labels, each in texts]
    yield _gauge("num_requests_running", "Texts of which something was computed", running, _MODEL)
    yield _gauge("num_requests_waiting", "Texts of which nothing was computed yet", waiting, _MODEL)
    prompts = [(labels, each.num_prompt_tokens) for labels, each in texts]
    yield _counter("prompt_tokens", "Tokens of prompts", _MODEL, prompts)
    yield _counter("generation_tokens", "Tokens drawn", _MODEL, [(labels, each.num_tokens) for labels, each in texts])
    first = [(labels, each.first_token) for labels, each in texts]
    yield _histogram("time_to_first_token_seconds", "From admission to the first token", _MODEL, first)
    between = [(labels, each.between_tokens) for labels, each in texts]
    yield _histogram("time_between_tokens_seconds", "From one token to the next", _MODEL, between)


def _shadows(shadows: Sequence[Shadow]) -> Iterator[Metric]:
    names = ("model", "alias", "candidate")
    told = [((each.terms.name, each.terms.alias, each.labels[1]), each) for each in shadows]
    seen = [(labels, each.num_seen) for labels, each in told]
    yield _counter("shadow_seen_images", "Images of calls of which a shadow may have a share", names, seen)
    recorded = [(labels, each.num_recorded) for labels, each in told]
    yield _counter("shadow_images", "Images that the candidate of a shadow saw as well", names, recorded)
    dropped = [((*labels, reason), count) for labels, each in told for reason, count in each.num_dropped.items()]
    yield _counter("shadow_dropped_images", "Images that it was to see and did not", (*names, "reason"), dropped)


def _counter(
    name: str, says: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, says, labels=labels)
    for each, value in values:
        family.add_metric(each, value)
    return family


def _gauge(
    name: str, says: str, values: Iterable[tuple[Sequence[str], float]], labels: Sequence[str] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, says, labels=labels)
    for each, value in values:
        family.add_metric(each, value)
    return family


def _histogram(
    name: str, says: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], Durations]]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(PREFIX + name, says, labels=labels)
    for each, durations in values:
        family.add_metric(each, _cumulative(BOUNDS_S, durations.within), durations.ns / 1e9)
    return family


def _cumulative(bounds: Sequence[float], within: Sequence[int]) -> list[tuple[str, float]]:
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, (float(count) for count in accumulate(within)), strict=True))
