"""What both services tell Prometheus: the names of all samples, with their labels."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from prometheus_client import CollectorRegistry, values
from prometheus_client.core import Metric

from services.inference.counts import CallCounts, LoadCounts
from services.inference.devices import Devices
from services.inference.loading import ServedLanguageModel
from services.inference.metrics import ServerMetrics, make_registry
from services.inference.observation import Observed
from services.inference.scheduler import DeviceScheduler
from services.trainer.metrics import PrometheusMeter
from services.trainer.scrape import Present
from services.trainer.scrape import make_registry as make_trainer_registry
from tandem.gpus import Gpu, Reading

# Of Prometheus itself, and of node_exporter.
OTHERS = {"up": {"job", "instance"}, "node_filesystem_avail_bytes": {"mountpoint"}}


class Queues:
    def jobs_by_state(self) -> dict[str, int]:
        return {"QUEUED": 2}

    def queue_lengths(self) -> dict[tuple[str, int], int]:
        return {("gpu", 0): 1}

    def queue_ages_s(self) -> dict[str, float]:
        return {"gpu": 12.5}


class Runtime:
    """Stands for what runs a model."""


def exported_metrics(folder: Path) -> dict[str, set[str]]:
    """Return the names of all samples that the services tell, with their labels; `folder` is for the trainer's."""
    reading = [Reading(Gpu(0, "GPU-1", "NVIDIA H200", 150), 30, 0.25)]
    found: dict[str, set[str]] = {name: set(labels) for name, labels in OTHERS.items()}
    for registry in (*_trainer(folder, reading), *_inference(reading)):
        for family in registry.collect():
            for name, labels in _samples(family):
                found.setdefault(name, set()).update(labels)
    return found


def _samples(family: Metric) -> Iterator[tuple[str, set[str]]]:
    for sample in family.samples:
        yield sample.name, set(sample.labels)


def _trainer(folder: Path, reading: list[Reading]) -> Iterator[CollectorRegistry]:
    with pytest.MonkeyPatch.context() as patch:
        # Building a meter changes both for the whole process.
        patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
        patch.setattr(values, "ValueClass", values.ValueClass)
        meter = PrometheusMeter(folder)
        meter.attempt_began()
        meter.progressed("train_classifier", 80.0)
        meter.saved(0.3, 1000)
        meter.attempt_ended("succeeded", 12.0)
        yield make_trainer_registry(folder, Present(lambda: None, lambda: reading, Queues()))


def _inference(reading: list[Reading]) -> Iterator[CollectorRegistry]:
    scheduler, runtime = DeviceScheduler(torch.device("cpu")), Runtime()
    try:
        version = SimpleNamespace(name="words", version=1)
        located = SimpleNamespace(version=version, label="words:1")
        served = ServedLanguageModel(*cast(Any, (located, None, runtime, None, None)))
        scheduler.begin_statistics(runtime, label="words:1")
        with pytest.raises(ValueError), scheduler.admit(1, runtime):
            raise ValueError
        calls = CallCounts()
        calls(Observed("tandem.v1.Inference/Generate", 0.0, ended_at=1.0))
        models = cast(Any, SimpleNamespace(loaded=lambda: (served,)))
        yield make_registry(ServerMetrics(models, Devices([scheduler]), calls, LoadCounts(), lambda: reading))
    finally:
        scheduler.close()
