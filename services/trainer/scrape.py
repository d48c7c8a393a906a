"""What /metrics tells: what the children have counted, and what is so at the moment of the scrape.

One server in the worker's parent. Nothing here may keep a scrape from being answered: a broker that is away is itself
what the answer says.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, multiprocess
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.errors import BrokerUnavailable
from tandem.exposition import gpu_metrics
from tandem.gpus import Reading


class QueueFacts(Protocol):
    """What the broker knows of all runs; every method raises BrokerUnavailable when it does not answer."""

    def jobs_by_state(self) -> dict[str, int]:
        """Return how many runs there are in each state."""
        ...

    def queue_lengths(self) -> dict[tuple[str, int], int]:
        """Return how many runs wait, by queue and priority."""
        ...

    def queue_ages_s(self) -> dict[str, float]:
        """Return for how many seconds the oldest run of each queue has waited, 0 where none waits."""
        ...


@dataclass(frozen=True)
class Present:
    """A collector of what is so now, from callables; `ping` raises BrokerUnavailable, `read_gpus` raises nothing."""

    ping: Callable[[], None]
    read_gpus: Callable[[], Sequence[Reading]]
    queues: QueueFacts | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of one scrape."""
        yield from self._broker()
        yield from gpu_metrics(self.read_gpus())

    def _broker(self) -> list[Metric]:
        up = GaugeMetricFamily("tandem_broker_up", "1 if the broker answered this scrape")
        try:
            self.ping()
            found = [] if self.queues is None else _queue_metrics(self.queues)
            up.add_metric([], 1)
        except BrokerUnavailable:
            # What is not known is left out: 0 jobs would be an answer.
            found = []
            up.add_metric([], 0)
        return [up, *found]


def _queue_metrics(queues: QueueFacts) -> list[Metric]:
    jobs = GaugeMetricFamily("tandem_jobs", "Runs by state", labels=["state"])
    for state, count in queues.jobs_by_state().items():
        jobs.add_metric([state], count)
    lengths = GaugeMetricFamily("tandem_queue_length", "Runs that wait", labels=["queue", "priority"])
    for (queue, priority), length in queues.queue_lengths().items():
        lengths.add_metric([queue, str(priority)], length)
    ages = GaugeMetricFamily("tandem_queue_age_seconds", "How long the oldest run has waited", labels=["queue"])
    for queue, age_s in queues.queue_ages_s().items():
        ages.add_metric([queue], age_s)
    return [jobs, lengths, ages]


def make_registry(directory: Path, present: Collector) -> CollectorRegistry:
    """Return what a scrape reads: the files that a PrometheusMeter writes to `directory`, and `present`."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]
    registry.register(present)
    return registry
