"""What Prometheus gets: counts of processes that come and go, the present by callables, and an answer in any case."""

import contextlib
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import generate_latest, values
from prometheus_client.parser import text_string_to_metric_families

from services.trainer.metrics import OUTCOMES, PrometheusMeter
from services.trainer.process import Spare
from services.trainer.scrape import Present, make_registry
from services.trainer.supervisor import Patience, Supervisor
from tandem.errors import BrokerUnavailable, Conflict, InvalidRequest
from tandem.exposition import serve_metrics
from tandem.gpus import Gpu, Reading
from tandem.jobs.store import JobStore
from tandem.settings import Settings
from tandem.volume import Volume

READING = Reading(Gpu(0, "GPU-1", "NVIDIA H200", 150), 30, 0.25)


class Queues:
    def jobs_by_state(self) -> dict[str, int]:
        return {"QUEUED": 2, "RUNNING": 1}

    def queue_lengths(self) -> dict[tuple[str, int], int]:
        return {("gpu", 0): 1, ("gpu", 9): 1}

    def queue_ages_s(self) -> dict[str, float]:
        return {"gpu": 12.5, "cpu": 0.0}


class AwayQueues(Queues):
    """A broker that goes away in the middle of a scrape."""

    def queue_ages_s(self) -> dict[str, float]:
        raise BrokerUnavailable("gone")


def away() -> None:
    raise BrokerUnavailable("no answer")


@dataclass
class Workers:
    """A pool in one process: `place` says which of its children speaks."""

    directory: Path
    place: str = "parent"

    def __post_init__(self) -> None:
        self.meter = PrometheusMeter(self.directory, place=lambda: self.place)

    def fork(self, place: str) -> PrometheusMeter:
        self.place = place
        self.meter.take_place()
        return self.meter

    def scrape(self) -> dict[str, float]:
        return samples(generate_latest(make_registry(self.directory, Present(lambda: None, list, Queues()))))


def samples(text: bytes) -> dict[str, float]:
    """Return the samples by their names with labels, as Prometheus writes them."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    # Building a meter changes both for the whole process.
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    return Workers(tmp_path)


def test_all_counts_are_there_from_the_start(workers: Workers) -> None:
    found = workers.scrape()
    assert {found[f'tandem_attempts_total{{outcome="{outcome}"}}'] for outcome in OUTCOMES} == {0}
    for name in ("tandem_attempts_running", "tandem_lease_renewals_missed_total", "tandem_checkpoint_seconds_count"):
        assert found[name] == 0


def test_the_counts_of_all_children_add_up(workers: Workers) -> None:
    for place, rate in (("0", 100.0), ("1", 50.0)):
        meter = workers.fork(place)
        meter.attempt_began()
        meter.progressed("train_language_model", rate)
        meter.saved(0.3, 44_900_000)
        meter.lease_missed()
    found = workers.scrape()
    assert found["tandem_attempts_running"] == 2
    assert found['tandem_step_rate{kind="train_language_model",unit="words"}'] == 150
    assert found["tandem_lease_renewals_missed_total"] == 2
    assert found['tandem_checkpoint_seconds_bucket{le="0.25"}'] == 0
    assert found['tandem_checkpoint_seconds_bucket{le="0.5"}'] == found["tandem_checkpoint_seconds_count"] == 2
    assert found["tandem_checkpoint_bytes_sum"] == 89_800_000
    # 64 MiB, as Go writes it.
    assert found['tandem_checkpoint_bytes_bucket{le="6.7108864e+07"}'] == 2


def test_an_attempt_that_ended_trains_on_nothing(workers: Workers) -> None:
    meter = workers.fork("0")
    meter.attempt_began()
    meter.progressed("train_classifier", 80.0)
    meter.attempt_ended("succeeded", 12.0)
    found = workers.scrape()
    assert found["tandem_attempts_running"] == 0
    assert found['tandem_step_rate{kind="train_classifier",unit="images"}'] == 0
    assert found['tandem_attempts_total{outcome="succeeded"}'] == 1
    assert (found["tandem_attempt_seconds_sum"], found["tandem_attempt_seconds_count"]) == (12, 1)


def test_the_dead_leave_their_counts_and_nothing_of_their_present(workers: Workers) -> None:
    workers.fork("0").lease_missed()
    num_files = len(list(workers.directory.iterdir()))
    for _ in range(20):
        # Each dies in the middle of an attempt, and another takes its place.
        meter = workers.fork("0")
        meter.attempt_began()
        meter.progressed("train_classifier", 80.0)
        workers.place = "parent"
        meter.lease_missed()
    workers.fork("0").lease_missed()
    found = workers.scrape()
    assert found["tandem_lease_renewals_missed_total"] == 22
    assert found["tandem_attempts_running"] == 0
    assert found['tandem_step_rate{kind="train_classifier",unit="images"}'] == 0
    assert len(list(workers.directory.iterdir())) == num_files


def test_a_scrape_tells_the_present(tmp_path: Path) -> None:
    found = samples(generate_latest(make_registry(tmp_path, Present(lambda: None, lambda: [READING], Queues()))))
    assert found == {
        "tandem_broker_up": 1,
        'tandem_jobs{state="QUEUED"}': 2,
        'tandem_jobs{state="RUNNING"}': 1,
        'tandem_queue_length{priority="0",queue="gpu"}': 1,
        'tandem_queue_length{priority="9",queue="gpu"}': 1,
        'tandem_queue_age_seconds{queue="gpu"}': 12.5,
        'tandem_queue_age_seconds{queue="cpu"}': 0,
        'tandem_gpu_memory_bytes{gpu="0",name="NVIDIA H200"}': 150,
        'tandem_gpu_memory_used_bytes{gpu="0",name="NVIDIA H200"}': 30,
        'tandem_gpu_utilization_ratio{gpu="0",name="NVIDIA H200"}': 0.25,
    }


@pytest.mark.parametrize("present", [Present(away, lambda: [READING], Queues()), Present(away, lambda: [READING])])
def test_without_a_broker_a_scrape_says_so_and_guesses_nothing(tmp_path: Path, present: Present) -> None:
    found = samples(generate_latest(make_registry(tmp_path, present)))
    assert found.pop("tandem_broker_up") == 0
    assert {name.partition("{")[0] for name in found} == {
        "tandem_gpu_memory_bytes",
        "tandem_gpu_memory_used_bytes",
        "tandem_gpu_utilization_ratio",
    }


def test_a_broker_that_goes_away_in_a_scrape_is_away(tmp_path: Path) -> None:
    found = samples(generate_latest(make_registry(tmp_path, Present(lambda: None, list, AwayQueues()))))
    assert found == {"tandem_broker_up": 0}


def test_a_gpu_that_does_not_tell_has_no_such_sample(tmp_path: Path) -> None:
    silent = Reading(READING.gpu, None, None)
    found = samples(generate_latest(make_registry(tmp_path, Present(lambda: None, lambda: [silent]))))
    assert found == {"tandem_broker_up": 1, 'tandem_gpu_memory_bytes{gpu="0",name="NVIDIA H200"}': 150}


class Leases(JobStore):
    """A broker that answers renewals with `answer`, or not at all."""

    def __init__(self, answer: bool | None) -> None:
        self._answer = answer

    def renew_lease(self, run_id: str, token: str, ttl_s: float) -> bool:
        if self._answer is None:
            raise BrokerUnavailable("no answer")
        return self._answer


@pytest.mark.parametrize(("answer", "misses"), [(True, 0), (False, 1), (None, 1)])
def test_each_renewal_that_fails_is_a_miss(workers: Workers, answer: bool | None, misses: int) -> None:
    patience, volume = Patience(lease_s=5.0, stop_grace_s=60.0), Volume(workers.directory)
    supervisor = Supervisor(
        Leases(answer), volume, patience, Spare(False), lambda _: None, lambda: False, workers.meter
    )
    with contextlib.suppress(Conflict, BrokerUnavailable):
        supervisor.renew("r", "token")
    assert workers.scrape()["tandem_lease_renewals_missed_total"] == misses


def test_names_follow_the_rules(workers: Workers) -> None:
    workers.meter.progressed("train_classifier", 80.0)
    registry = make_registry(workers.directory, Present(lambda: None, lambda: [READING], Queues()))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert len(families) == len({family.name for family in families}) == 14
    for family in families:
        assert re.fullmatch(r"tandem_[a-z_]+", family.name)
        assert family.documentation
        # Base units, and the suffixes that belong to a type on no other.
        assert not re.search(r"_(ms|minutes|kb|mb|percent|count|sum|bucket|total)$", family.name), family.name
        assert all(sample.name.endswith("_total") for sample in family.samples) == (family.type == "counter")


def test_they_are_served_over_http(workers: Workers) -> None:
    server = serve_metrics(("127.0.0.1", 0), make_registry(workers.directory, Present(away, list)))
    try:
        with urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert samples(answer.read())["tandem_broker_up"] == 0
    finally:
        server.shutdown()
        server.server_close()


def test_an_address_that_can_not_be_bound_is_one_line(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, Present(away, list))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=rf"metrics on 127.0.0.1:{port}: Address already in use; .*_METRICS_LISTEN"):
            serve_metrics(("127.0.0.1", port), registry)
    with pytest.raises(Conflict, match=r"can't serve metrics on 192\.0\.2\.1:9464"):
        serve_metrics(("192.0.2.1", 9464), registry)


def test_the_setting_is_off_by_default_and_names_itself_when_wrong() -> None:
    assert Settings.from_environment({}).metrics_listen is None
    assert Settings.from_environment({"TANDEM_METRICS_LISTEN": "[::1]:9464"}).metrics_listen == ("::1", 9464)
    for wrong in ("9464", "localhost:", "localhost:70000", "localhost:x"):
        with pytest.raises(InvalidRequest, match=f"TANDEM_METRICS_LISTEN: can't listen on '{wrong}': write HOST:PORT"):
            Settings.from_environment({"TANDEM_METRICS_LISTEN": wrong})
