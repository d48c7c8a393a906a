"""What a worker counts of its runs, for Prometheus.

The children of the worker record, its parent is scraped (`scrape`): prometheus_client's multiprocess mode, files in a
directory that they share. A file belongs to a place in the pool and not to a pid, so a child that takes the place of a
dead one counts on in its file, and there are never more files than places.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

# How an attempt ends: `stopped` by a drain, `lost` without a word (killed, crashed), `abandoned` when another worker
# has the run.
OUTCOMES = ("succeeded", "failed", "canceled", "paused", "stopped", "lost", "abandoned")

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_ATTEMPT_S = (1, 10, _MINUTE, 5 * _MINUTE, 30 * _MINUTE, _HOUR, 4 * _HOUR, 12 * _HOUR, _DAY, 3 * _DAY)
_CHECKPOINT_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
# From 1 MiB to 16 GiB, each four times the one before: SqueezeNet with its optimizer has 10 MB, ResNet-152 half a GB.
_CHECKPOINT_BYTES = tuple(2**power for power in range(20, 35, 2))


class Meter(Protocol):
    """Takes note of what happens to runs; none of it can fail a run."""

    def attempt_began(self) -> None:
        """Note that a training process is about to start."""
        ...

    def attempt_ended(self, outcome: str, seconds: float) -> None:
        """Note how an attempt ended (one of OUTCOMES, or the record's new state), and how long it took."""
        ...

    def progressed(self, kind: str, rate_per_s: float) -> None:
        """Note how many images or words a second a run of `kind` does now."""
        ...

    def saved(self, seconds: float, num_bytes: int) -> None:
        """Note that a checkpoint of `num_bytes` held the training up for `seconds`."""
        ...

    def lease_missed(self) -> None:
        """Note that a lease was to be renewed and was not."""
        ...


class _NoMeter:
    def attempt_began(self) -> None:
        pass

    def attempt_ended(self, outcome: str, seconds: float) -> None:
        pass

    def progressed(self, kind: str, rate_per_s: float) -> None:
        pass

    def saved(self, seconds: float, num_bytes: int) -> None:
        pass

    def lease_missed(self) -> None:
        pass


NO_METER: Meter = _NoMeter()


class PrometheusMeter:
    """The Meter that counts into files in `directory`, one set for each `place`.

    `place()` names the caller's place among the processes that share the directory; no two of them that live may have
    the same. Build one before the fork: it sets how prometheus_client keeps values in this process and its children.
    """

    def __init__(self, directory: Path, place: Callable[[], object] = os.getpid) -> None:
        # Read when prometheus_client is first imported, and again each time that it opens a file.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values

        values.ValueClass = values.MultiProcessValue(place)  # type: ignore[no-untyped-call]
        self._directory, self._place = directory, place
        # Nobody scrapes this one; what is scraped reads the files.
        registry = CollectorRegistry()
        self._running = Gauge(
            "tandem_attempts_running", "Attempts under way", registry=registry, multiprocess_mode="livesum"
        )
        self._attempts = Counter("tandem_attempts", "Attempts that ended, by how", ["outcome"], registry=registry)
        self._attempt_seconds = Histogram(
            "tandem_attempt_seconds", "How long attempts took", registry=registry, buckets=_ATTEMPT_S
        )
        self._rate = Gauge(
            "tandem_step_rate",
            "Images or words a second that runs train on now",
            ["kind", "unit"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._checkpoint_seconds = Histogram(
            "tandem_checkpoint_seconds", "How long saving held training up", registry=registry, buckets=_CHECKPOINT_S
        )
        self._checkpoint_bytes = Histogram(
            "tandem_checkpoint_bytes", "Size of checkpoints", registry=registry, buckets=_CHECKPOINT_BYTES
        )
        self._missed = Counter("tandem_lease_renewals_missed", "Renewals of a lease that failed", registry=registry)
        for outcome in OUTCOMES:
            # There from the start with 0, so that the first one is an increase that an alert sees.
            self._attempts.labels(outcome)
        self._kinds: set[str] = set()

    def take_place(self) -> None:
        """In a child that begins: what its predecessor said of its own present no longer holds; its counts do."""
        from prometheus_client import multiprocess

        multiprocess.mark_process_dead(self._place(), str(self._directory))  # type: ignore[no-untyped-call]
        # Opens this place's files. They are mapped, and to grow one on a full disk is SIGBUS: better now than in a run.
        self._missed.inc(0)

    def attempt_began(self) -> None:
        """Count one more under way."""
        self._running.inc()

    def attempt_ended(self, outcome: str, seconds: float) -> None:
        """Count the attempt; nothing is trained on any more."""
        self._running.dec()
        self._attempts.labels(outcome).inc()
        self._attempt_seconds.observe(seconds)
        for kind in self._kinds:
            self._rate.labels(kind, _unit(kind)).set(0)

    def progressed(self, kind: str, rate_per_s: float) -> None:
        """Set the rate of `kind`."""
        self._kinds.add(kind)
        self._rate.labels(kind, _unit(kind)).set(rate_per_s)

    def saved(self, seconds: float, num_bytes: int) -> None:
        """Count the checkpoint."""
        self._checkpoint_seconds.observe(seconds)
        self._checkpoint_bytes.observe(num_bytes)

    def lease_missed(self) -> None:
        """Count the miss."""
        self._missed.inc()


def _unit(kind: str) -> str:
    return "images" if kind.endswith("classifier") else "words"
