"""Runs of hosts that share a broker and an object store, and no volume: taken up elsewhere, published, and served."""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from factories import publish_classifier
from grpc_health.v1 import health_pb2, health_pb2_grpc
from inference_server import start_server
from object_stores import S3Server, s3_server
from rig import LONG, Bench
from waiting import wait_for

from tandem.checkpoints.files import WEIGHTS_FILE, list_checkpoints, read_verified
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.store.transfer import list_stored, upload_checkpoint
from tandem.client import Client
from tandem.errors import StoreUnavailable
from tandem.jobs.runs import cancel
from tandem.volume import Volume


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server.clear()


@pytest.fixture
def shared(bench: Bench, s3: S3Server) -> Bench:
    """The rig, whose volume shares the store."""
    bench.volume = Volume(bench.volume.home, s3.address)
    bench.environment = {**s3.environment, "TANDEM_CHECKPOINT_STORE": s3.address}
    return bench


def other_host(bench: Bench, tmp_path: Path) -> Bench:
    """Another host: the same broker, the same data, and a volume of its own."""
    volume = Volume(tmp_path / "other", bench.volume.store)
    volume.home.mkdir()
    shutil.copytree(bench.volume.datasets, volume.datasets)
    return replace(bench, volume=volume, workers=[])


def test_a_run_whose_host_is_gone_goes_on_elsewhere_and_its_model_is_served(
    shared: Bench, s3: S3Server, tmp_path: Path
) -> None:
    run_id = shared.language_model(**LONG)
    first = shared.start_worker()
    shared.wait_for_step(run_id, 1)
    wait_for(lambda: len(list_stored(s3.store, run_id)) > 0, "a checkpoint in the store")
    os.killpg(first.pid, signal.SIGKILL)
    saved = list_stored(s3.store, run_id)[-1].step
    # Nothing of the first host's volume is left.
    shutil.rmtree(shared.volume.runs)
    other = other_host(shared, tmp_path)
    try:
        other.start_worker()
        record = other.wait_for_state(run_id, "SUCCEEDED", "FAILED")
        assert record.state == "SUCCEEDED", other.worker_log()
        assert record.attempt == 2
        log = (other.volume.run(run_id) / "log.txt").read_text()
        assert f"attempt 2 resumes at step {saved}" in log
    finally:
        other.stop()
    version = Registry(other.volume).versions("words")[0]
    server = start_server(
        tmp_path / "server",
        Volume(tmp_path / "cache"),
        **s3.environment,
        TANDEM_CHECKPOINT_STORE=s3.address,
        TANDEM_REDIS_URL=str(shared.url),
    )
    try:
        with Client(server.address) as client:
            wait_for(lambda: [model.name for model in client.list_models()] == ["words"], "the model")
            assert len(list(client.generate("words", max_words=3))) > 1
    finally:
        server.stop()
    served = read_verified(tmp_path / "cache" / version.checkpoint, (WEIGHTS_FILE,), version.sha256)
    assert served == read_verified(other.volume.home / version.checkpoint, (WEIGHTS_FILE,))


def test_a_store_that_is_away_from_the_start_holds_up_nothing_but_the_end(shared: Bench, s3: S3Server) -> None:
    run_id = shared.language_model(epochs=2, checkpoint_every_s=0.2)
    s3.is_away = True
    shared.start_worker()
    wait_for(lambda: shared.record(run_id).progress.epoch == 2, "training without the store")
    wait_for(lambda: (shared.volume.run(run_id) / "status.json").exists(), "the end of training")
    assert shared.record(run_id).state == "RUNNING"
    assert shared.worker_log().count("goes on, and what it saves is uploaded later") == 1
    s3.is_away = False
    shared.wait_for_state(run_id, "SUCCEEDED")
    assert shared.record(run_id).attempt == 1
    kept = [checkpoint.name for checkpoint in list_checkpoints(shared.volume.run(run_id))]
    assert [stored.name for stored in list_stored(s3.store, run_id)] == kept
    assert len(s3.store.sizes("models/words")) == 1


def test_a_worker_that_is_told_to_stop_leaves_its_checkpoint_in_the_store(shared: Bench, s3: S3Server) -> None:
    run_id = shared.language_model(epochs=40, checkpoint_every_s=600)
    worker = shared.start_worker()
    shared.wait_for_step(run_id, 1)
    worker.send_signal(signal.SIGTERM)
    worker.wait(60)
    newest = list_checkpoints(shared.volume.run(run_id))[-1]
    assert list_stored(s3.store, run_id)[-1].name == newest.name
    assert shared.record(run_id).state == "QUEUED"


def test_a_run_that_waits_for_the_store_can_be_canceled(shared: Bench, s3: S3Server) -> None:
    run_id = shared.language_model(epochs=1)
    s3.is_away = True
    shared.start_worker(TANDEM_STOP_GRACE_S="1")
    wait_for(lambda: (shared.volume.run(run_id) / "status.json").exists(), "the end of training")
    cancel(run_id, shared.volume, shared.store)
    record = shared.wait_for_state(run_id, "CANCELED", "FAILED", "SUCCEEDED")
    assert record.state == "CANCELED"
    assert len(list_checkpoints(shared.volume.run(run_id))) == 1


def test_a_server_with_nothing_to_serve_is_not_ready_before_it_has_seen_the_store(s3: S3Server, tmp_path: Path) -> None:
    publisher = Volume(tmp_path / "publisher")
    version = publish_classifier(publisher, "shapes", "r1")
    checkpoint = publisher.home / version.checkpoint
    upload_checkpoint(s3.store, "r1", checkpoint.name, checkpoint)
    # The first change of a model takes along what the volume has.
    Registry(Volume(publisher.home, s3.address)).set_alias("shapes", "production", 1, "test")
    s3.is_away = True
    cache = Volume(tmp_path / "cache")
    server = start_server(tmp_path / "server", cache, **s3.environment, TANDEM_CHECKPOINT_STORE=s3.address)
    try:
        with grpc.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            wait_for(lambda: "what is here goes on being served" in server.log.read_text(), "a look at the store")
            assert status(health) == health_pb2.HealthCheckResponse.NOT_SERVING
            s3.is_away = False
            wait_for(lambda: status(health) == health_pb2.HealthCheckResponse.SERVING, "readiness")
            assert status(health, "models/shapes") == health_pb2.HealthCheckResponse.SERVING
    finally:
        server.stop()
    assert server.log.read_text().count("what is here goes on being served") == 1


def status(health: Any, service: str = "") -> int:
    found: int = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
    return found


def test_a_job_that_no_other_host_could_see_is_not_submitted(shared: Bench, s3: S3Server) -> None:
    shared.store.add_queues(["default"])
    s3.is_away = True
    with pytest.raises(StoreUnavailable):
        shared.language_model()
    assert list(shared.volume.runs.iterdir()) == []
    assert sum(shared.store.count_by_state().values()) == 0
    s3.is_away = False
    assert s3.store.get(f"runs/{shared.language_model()}/job.json") is not None
