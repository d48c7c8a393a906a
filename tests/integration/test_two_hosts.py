"""Two hosts with a worker each, joined by address and volume alone: one is cut off, the clock of one is wrong."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import Server, free_port
from hosts import Host
from rig import Bench
from samples import write_text_dataset
from waiting import wait_for

from tandem.checkpoints.files import WEIGHTS_FILE, read_pointer, read_verified
from tandem.checkpoints.registry import Registry
from tandem.jobs import runs
from tandem.jobs.broker import VARIABLES, Broker
from tandem.jobs.queue import queue_for
from tandem.jobs.spec import make_spec
from tandem.jobs.submit import PLAIN, new_record
from tandem.volume import Volume, replace_file

# Longer than a cut, with time for the other host to take over.
LONG = {"epochs": 100, "checkpoint_every_s": 0.5, "model_name": "words"}
SECRET = "a password"


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    made: list[Host] = []
    try:
        for index in range(2):
            made.append(Host.make(index))
        yield made
    finally:
        for host in made:
            host.remove()


@pytest.fixture
def shared(hosts: list[Host], tmp_path: Path) -> Iterator[Bench]:
    """A volume, and a broker with a password that each host reaches over its own cable."""
    volume = Volume(tmp_path / "home")
    volume.home.mkdir()
    write_text_dataset(volume, "words")
    (tmp_path / "password").write_text(SECRET + "\n")
    port = str(free_port())
    addresses = " ".join(["127.0.0.1", *(host.our_address for host in hosts)])
    server = Server(volume.home, {"port": port, "bind": addresses, "requirepass": SECRET}).start()
    assert server.process is not None
    environment = {**dict.fromkeys(VARIABLES, ""), "TANDEM_REDIS_PASSWORD_FILE": str(tmp_path / "password")}
    bench = Bench(volume, Broker("127.0.0.1", int(port), password=SECRET), server.process, environment=environment)
    try:
        yield bench
    finally:
        bench.stop()


def start_worker(bench: Bench, host: Host) -> "subprocess.Popen[bytes]":
    assert isinstance(bench.url, Broker)
    bench.environment["TANDEM_REDIS_URL"] = f"redis://{host.our_address}:{bench.url.port}/0"
    return bench.start_worker(*host.prefix)


def processes_on(bench: Bench, run_id: str, host: Host) -> list[int]:
    return [pid for pid in bench.training_processes(run_id) if host.runs(pid)]


def weights(bench: Bench, run_id: str) -> bytes:
    checkpoint = read_pointer(bench.volume.run(run_id), "latest")
    assert checkpoint is not None
    return read_verified(checkpoint, (WEIGHTS_FILE,))[WEIGHTS_FILE]


def test_a_host_that_is_cut_off_loses_its_run_to_the_other_and_comes_back(shared: Bench, hosts: list[Host]) -> None:
    workers = {host.name: start_worker(shared, host) for host in hosts}
    undisturbed = shared.language_model(**{**LONG, "model_name": "undisturbed"})
    assert shared.wait_for_state(undisturbed, "SUCCEEDED", "FAILED").state == "SUCCEEDED"
    run_id = shared.language_model(**LONG)
    shared.wait_for_step(run_id, 50)
    (cut,) = (host for host in hosts if processes_on(shared, run_id, host))
    (other,) = (host for host in hosts if host is not cut)

    cut.unplug()
    wait_for(lambda: processes_on(shared, run_id, other), "the other host takes over")
    wait_for(lambda: not processes_on(shared, run_id, cut), "the end of the process that was fenced off")
    assert workers[cut.name].poll() is None
    record = shared.wait_for_state(run_id, "SUCCEEDED", "FAILED")
    assert (record.state, record.attempt) == ("SUCCEEDED", 2), record.message
    before = contents(shared.volume.run(run_id))

    cut.plug_in()
    wait_for(lambda: len(shared.store.workers()) == 2, "a heartbeat of the host that is back")
    workers[other.name].terminate()
    workers[other.name].wait(240)
    later = shared.language_model(model_name="later")
    assert shared.wait_for_state(later, "SUCCEEDED", "FAILED").state == "SUCCEEDED"
    assert contents(shared.volume.run(run_id)) == before, "what was fenced off has written something"
    assert weights(shared, run_id) == weights(shared, undisturbed)
    assert [version.run_id for version in Registry(shared.volume).versions("words")] == [run_id]
    check_events(shared.volume.run(run_id))


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def check_events(run: Path) -> None:
    """From the second attempt's start on, the events are its own: their steps never fall back, nor jump."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (second,) = (row for row, event in enumerate(events) if event["type"] == "started" and event["attempt"] == 2)
    steps = [event["step"] for event in events[second:] if event["type"] in ("started", "progress", "checkpoint")]
    assert steps == sorted(steps)
    assert [event["attempt"] for event in events if event["type"] == "ended"] == [2]


def test_a_host_with_a_wrong_clock_sends_a_run_again_that_no_message_wakes(shared: Bench, hosts: list[Host]) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime: apt-get install faketime")
    shared.environment.update(LD_PRELOAD=str(library), FAKETIME="+3d", FAKETIME_DONT_FAKE_MONOTONIC="1")
    start_worker(shared, hosts[0])
    values = {"kind": "train_language_model", "dataset": "words", "model_name": "m", "model": "LSTM", "epochs": 1}
    spec = make_spec({**values, "embedding_size": 16, "hidden_size": 16, "batch_size": 4, "bptt": 8, "num_threads": 1})
    # As `submit` does, but for the message.
    record = new_record(spec, queue_for(spec), PLAIN)
    run = shared.volume.run(record.run_id)
    run.mkdir(parents=True)
    replace_file(run / runs.SPEC_FILE, spec.model_dump_json().encode())
    runs.mirror(shared.volume, record)
    shared.store.create(record)
    done = shared.wait_for_state(record.run_id, "SUCCEEDED", "FAILED")
    assert (done.state, done.attempt) == ("SUCCEEDED", 1), done.message
