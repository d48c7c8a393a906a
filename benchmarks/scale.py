"""What one Redis, one volume and one store have to bear for each run and each worker.

docs/operations/scaling.md reckons with it; no claims. Traffic is on loopback and on the local disk, and the store is
moto's S3: its times are no store's.
"""

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.plant import Plant, plant, wait_for
from services.trainer.reaper import Reaper
from tandem.checkpoints.files import list_checkpoints, write_checkpoint
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.store.transfer import list_stored, upload_checkpoint
from tandem.jobs.record import JobRecord, State
from tandem.jobs.runs import cancel
from tandem.jobs.scheduling import Scheduling
from tandem.jobs.submit import new_record
from tandem.models.classifiers import build_classifier
from tandem.volume import Volume

WATCH_S = 30.0
N = 20


def main() -> None:
    """Print the figures."""
    _broker()
    _reaper()
    _checkpoints()
    _volume()
    _store()


def _broker() -> None:
    with plant() as made:
        made.start_worker()
        idle = _commands(made)
        run_id = made.submit()
        wait_for(lambda: made.record(run_id).progress.step > 1)
        busy = _commands(made)
        events = (made.volume.run(run_id) / "events.jsonl").stat().st_size
        spent = made.record(run_id).spent_s
        cancel(run_id, made.volume, made.store)
        wait_for(lambda: made.record(run_id).state is State.CANCELED)
        print(f"A worker that waits: {idle[0]:.1f} commands/s, {1e3 * idle[1]:.2f} ms of the broker's CPU a second")
        print(f"With a run in it: {busy[0]:.1f} commands/s, {1e3 * busy[1]:.2f} ms (over {WATCH_S:.0f} s, n = 1)")
        print(f"Its events.jsonl grows by {events / spent:.0f} bytes/s")
        _most_updates(made)


def _commands(made: Plant) -> tuple[float, float]:
    """Return commands and CPU seconds of the broker in a second."""
    client = made.store._redis

    def now() -> tuple[float, float]:
        counted, cpu = client.info("stats"), client.info("cpu")
        return counted["total_commands_processed"], cpu["used_cpu_user"] + cpu["used_cpu_sys"]

    before = now()
    time.sleep(WATCH_S)
    after = now()
    return (after[0] - before[0]) / WATCH_S, (after[1] - before[1]) / WATCH_S


def _most_updates(made: Plant) -> None:
    """Print how many progress reports a second one client gets through: an event and an update of the record each."""
    record = new_record(made.spec(), "default", Scheduling())
    made.store.create(record)
    count, began, cpu = 2000, time.monotonic(), _broker_cpu(made)
    for step in range(count):
        made.store.add_event(record.run_id, {"type": "progress", "step": step, "metrics": {"train_loss": 1.0}})
        made.store.update(record.run_id, partial(_saved, step=step + 1))
    took = time.monotonic() - began
    cost = (_broker_cpu(made) - cpu) / count
    print(f"Progress reports of one client: {count / took:.0f}/s, {1e6 * cost:.0f} µs of the broker's CPU each")


def _saved(record: JobRecord, step: int) -> JobRecord:
    return record.model_copy(update={"saved_step": step})


def _broker_cpu(made: Plant) -> float:
    cpu = made.store._redis.info("cpu")
    return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])


def _reaper() -> None:
    for num_runs in (100, 1000):
        with plant() as made:
            for number in range(num_runs):
                record = new_record(made.spec(), "default", Scheduling())
                made.store.create(record.model_copy(update={"state": State.RUNNING, "attempt": 1}))
                made.store.acquire_lease(record.run_id, f"elsewhere-{number}/1/1/x", 600.0)
            reaper = Reaper(made.store, made.volume, 5.0, lambda _: None)
            reaper.sweep()
            wait_for(lambda: made.store.life()[1] > 11)
            times = [_timed(reaper.sweep) for _ in range(N)]
            print(f"A sweep over {num_runs} running runs: {1e3 * statistics.median(times):.1f} ms (median, n = {N})")


def _timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def _checkpoints() -> None:
    network = build_classifier("resnet18", 200, 64)
    weights = sum(each.nbytes for each in network.state_dict().values())
    print(
        f"ResNet-18, 200 classes: {weights / 1e6:.1f} MB of weights; with SGD's momentum {2 * weights / 1e6:.0f} MB, "
        f"with AdamW {3 * weights / 1e6:.0f} MB"
    )


def _volume() -> None:
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        volume = Volume(Path(folder))
        registry = Registry(volume)
        times = []
        for number in range(200):
            checkpoint = volume.run(f"r{number}") / "checkpoints" / "step-00000001"
            write_checkpoint(checkpoint, {"model.safetensors": os.urandom(10**6)})
            times.append(
                _timed(partial(registry.publish, "m", "classifier", f"r{number}", checkpoint, {"val_acc1": 1.0}))
            )
        first, last = statistics.median(times[:50]), statistics.median(times[-50:])
        print(
            f"Publishing a checkpoint of 1 MB: {1e3 * first:.1f} ms as one of the first 50 versions of a model, "
            f"{1e3 * last:.1f} ms as one of the 151st to 200th (medians)"
        )
        data, count = os.urandom(100 * 10**6), 5
        times = [
            _timed(
                partial(
                    write_checkpoint,
                    volume.run("big") / "checkpoints" / f"step-{step:08d}",
                    {"model.safetensors": data},
                )
            )
            for step in range(count)
        ]
        print(f"A checkpoint of 100 MB, hashed and fsynced: {statistics.median(times):.2f} s (median, n = {count})")


def _store() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from object_stores import s3_server

    with s3_server() as server, tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        server.clear()
        store, volume = server.store, Volume(Path(folder), server.address)
        checkpoint = volume.run("r0") / "checkpoints" / "step-00000001"
        write_checkpoint(checkpoint, {f"{name}.json": b"x" for name in "abcde"})
        upload_checkpoint(store, "r0", checkpoint.name, checkpoint)
        write_checkpoint(checkpoint, {f"{name}.json": b"y" for name in "abcde"})
        before = server.num_requests
        upload_checkpoint(store, "r0", checkpoint.name, checkpoint)
        print(f"Requests to upload a checkpoint of five files and a manifest: {server.num_requests - before}")
        before = server.num_requests
        Registry(volume).publish("m", "classifier", "r0", checkpoint, {"val_acc1": 1.0})
        print(f"to publish it: {server.num_requests - before}")
        before = server.num_requests
        Registry(replace(volume, home=Path(folder) / "other")).catch_up_all()
        Registry(volume).catch_up_all()
        Registry(volume).catch_up_all()
        print(f"for three looks at one model, the first of which brings a change: {server.num_requests - before}")
        _upload(server.address, volume)


def _upload(address: str, volume: Volume) -> None:
    from tandem.checkpoints.store.objects import ObjectStore

    store, cpu, wall = ObjectStore(address), [], []
    for step in range(5):
        checkpoint = volume.run("big") / "checkpoints" / f"step-{step:08d}"
        write_checkpoint(checkpoint, {"model.safetensors": os.urandom(100 * 10**6)})
        began, used = time.monotonic(), _own_cpu()
        upload_checkpoint(store, "big", checkpoint.name, checkpoint)
        wall.append(time.monotonic() - began)
        cpu.append(_own_cpu() - used)
    assert len(list_stored(store, "big")) == len(list_checkpoints(volume.run("big"))) == 5
    print(
        f"100 MB to moto's server in this very process: {statistics.median(wall):.2f} s, "
        f"{statistics.median(cpu):.2f} s of CPU of both ends (medians, n = 5)"
    )


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
