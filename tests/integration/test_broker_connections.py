"""Real servers behind a password, TLS and client certificates: both clients come in, and what is wrong is said."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
from brokers import Certificates, Server, free_port, tls_options, tls_server
from factories import queued_record
from rig import Bench
from samples import write_text_dataset
from shell import Shell
from waiting import wait_for

from tandem.errors import BrokerUnavailable
from tandem.jobs.broker import VARIABLES, Broker, Tls
from tandem.jobs.queue import make_celery, priority_keys, send_run
from tandem.jobs.store import JobStore, connect
from tandem.volume import Volume

SECRET = "p@:/%#;w"
ENCODED = "p%40%3A%2F%25%23%3Bw"

Serve = Callable[..., Server]


@pytest.fixture(autouse=True)
def _fresh_pools() -> None:
    # kombu keeps its connections by host, port and user: one that was let in would serve a client that should not be.
    _forget_connections()


def _forget_connections() -> None:
    reset: Any = kombu.pools.reset
    reset()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers with the options given; they end with the test."""
    servers: list[Server] = []

    def start(binary: str = "", **options: str) -> Server:
        directory = tmp_path / f"server-{len(servers)}"
        directory.mkdir()
        named = {name.replace("_", "-"): value for name, value in options.items()}
        servers.append(Server(directory, named, binary).start())
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    tls_server()
    return Certificates(tmp_path_factory.mktemp("authority"))


def tls_broker(serve: Serve, certificates: Certificates, names: str, auth_clients: bool = False, **more: str) -> Broker:
    port = free_port()
    crt, key = certificates.sign(f"server-{port}", names)
    options = tls_options(port, certificates, crt, key, auth_clients)
    serve(tls_server(), **{name.replace("-", "_"): value for name, value in options.items()}, **more)
    return Broker("localhost", port, tls=Tls(certificates.ca))


def check_both_clients(address: Broker | str) -> None:
    store = JobStore(connect(address), address)
    store.ping()
    send_run(make_celery(address), queued_record("a-run"))
    assert sum(store.count_messages(priority_keys("default"))) == 1


def refusals(address: Broker | str) -> list[str]:
    """Return what redis-py's side and Celery's say, a line each."""
    app = make_celery(address)
    said: list[str] = []
    attempts: tuple[Callable[[], None], ...] = (
        lambda: JobStore(connect(address), address).beat("w", 5, {}),
        lambda: send_run(app, queued_record("a-run")),
    )
    for attempt in attempts:
        with pytest.raises(BrokerUnavailable) as refused:
            attempt()
        said.append(str(refused.value))
        assert "\n" not in said[-1]
        assert SECRET not in said[-1]
        assert ENCODED not in said[-1]
    return said


def test_a_password_with_signs_opens_a_port(serve: Serve) -> None:
    port = free_port()
    serve(port=str(port), requirepass=SECRET)
    check_both_clients(f"redis://:{ENCODED}@127.0.0.1:{port}/1")
    for line in refusals(f"redis://127.0.0.1:{port}/0"):
        assert "wants a password" in line
        assert "TANDEM_REDIS_PASSWORD_FILE" in line
    for line in refusals(f"redis://:{ENCODED}x@127.0.0.1:{port}/0"):
        assert f"redis://127.0.0.1:{port}/0 does not accept the user and password" in line
    for line in refusals(f"redis://:{ENCODED}@127.0.0.1:{port}/99"):
        assert "has no database of that number" in line


def test_a_password_opens_a_unix_socket(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "a b#c"
    folder.mkdir()
    serve(port=str(free_port()), unixsocket=str(folder / "s"), requirepass=SECRET)
    check_both_clients(Broker(path=str(folder / "s"), db=2, password=SECRET))
    for line in refusals(Broker(path=str(folder / "s"))):
        assert "wants a password" in line
    for line in refusals("unix:///nowhere/s"):
        assert "there is no such socket" in line


def test_tls_is_checked_by_both_clients(serve: Serve, certificates: Certificates) -> None:
    broker = tls_broker(serve, certificates, "DNS:localhost", requirepass=SECRET)
    broker = replace(broker, password=SECRET)
    check_both_clients(broker)
    _forget_connections()
    for line in refusals(replace(broker, tls=Tls())):
        assert "shows a certificate by none we trust" in line
        assert "TANDEM_REDIS_CA_FILE" in line
    for line in refusals(replace(broker, host="127.0.0.1")):
        assert "shows a certificate for another name" in line
    for line in refusals(replace(broker, tls=None)):
        assert "does not answer: it closed the connection" in line
        assert "rediss://" in line


def test_a_broker_may_want_a_certificate_of_its_clients(serve: Serve, certificates: Certificates) -> None:
    broker = tls_broker(serve, certificates, "DNS:localhost", auth_clients=True)
    crt, key = certificates.sign("worker", "DNS:worker")
    check_both_clients(replace(broker, tls=Tls(certificates.ca, crt, key)))
    _forget_connections()
    for line in refusals(broker):
        assert "wants a certificate of its clients" in line
        assert "set TANDEM_REDIS_CERT_FILE" in line


def test_a_tls_client_on_a_plain_port_is_told(serve: Serve) -> None:
    port = free_port()
    serve(port=str(port))
    with pytest.raises(BrokerUnavailable, match="write redis://"):
        JobStore(connect(f"rediss://localhost:{port}"), f"rediss://localhost:{port}").ping()


def test_what_is_not_there_or_no_redis_is_told() -> None:
    for line in refusals(f"redis://127.0.0.1:{free_port()}"):
        assert "does not answer: nothing listens there" in line
    for line in refusals("redis://no-such-host.invalid"):
        assert "no host has that name" in line
    with socket.create_server(("127.0.0.1", 0)) as web:
        threading.Thread(target=_answer_as_a_web_server, args=(web,), daemon=True).start()
        for line in refusals(f"redis://127.0.0.1:{web.getsockname()[1]}"):
            assert "is no Redis" in line


def _answer_as_a_web_server(web: socket.socket) -> None:
    while True:
        try:
            client, _ = web.accept()
        except OSError:
            return
        with client:
            client.recv(100)
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("CONFIG SET maxmemory 1", "is out of memory"),
        ("REPLICAOF 127.0.0.1 1", "is a read-only replica: TANDEM_REDIS_URL must name the primary"),
        ("CONFIG SET min-replicas-to-write 1", "NOREPLICAS"),
        ("ACL SETUSER default -set -lpush", "does not let this user do that"),
    ],
)
def test_a_broker_that_takes_no_writes_says_why(serve: Serve, command: str, message: str) -> None:
    port = free_port()
    serve(port=str(port))
    _execute(port, *command.split())
    for line in refusals(f"redis://127.0.0.1:{port}"):
        assert message in line


def test_a_broker_that_can_not_save_says_so(serve: Serve) -> None:
    port = free_port()
    server = serve(port=str(port), appendonly="no", save="3600 1")
    shutil.rmtree(server.directory)
    _execute(port, "BGSAVE")
    wait_for(lambda: connect(f"redis://127.0.0.1:{port}").info()["rdb_last_bgsave_status"] == "err")
    for line in refusals(f"redis://127.0.0.1:{port}"):
        assert "can't save to its disk" in line


def _execute(port: int, *words: str) -> None:
    client: Any = connect(f"redis://127.0.0.1:{port}")
    client.execute_command(*words)


def test_the_first_call_after_a_restart_of_the_broker_succeeds(serve: Serve) -> None:
    port = free_port()
    server = serve(port=str(port))
    url = f"redis://127.0.0.1:{port}"
    store = JobStore(connect(url), url)
    for _ in range(3):
        assert store.acquire_lease("r", "token", 60)
        assert store.renew_lease("r", "token", 60)
        server.kill()
        server.start()
        # A script, which the new server does not know yet.
        assert store.renew_lease("r", "token", 60)
        store.release_lease("r", "token")


def test_a_whole_run_over_tls_with_the_password_in_a_file(
    serve: Serve, certificates: Certificates, tmp_path: Path
) -> None:
    broker = tls_broker(serve, certificates, "DNS:localhost", requirepass=SECRET)
    (tmp_path / "password").write_text(SECRET + "\n")
    volume = Volume(tmp_path / "home")
    volume.home.mkdir()
    write_text_dataset(volume, "words")
    environment = {
        **dict.fromkeys(VARIABLES, ""),
        "TANDEM_REDIS_URL": f"rediss://localhost:{broker.port}",
        "TANDEM_REDIS_PASSWORD_FILE": str(tmp_path / "password"),
        "TANDEM_REDIS_CA_FILE": str(certificates.ca),
    }
    bench = Bench(volume, replace(broker, password=SECRET), subprocess.Popen(["true"]), environment=environment)
    try:
        bench.start_worker()
        record = bench.wait_for_state(bench.language_model(), "SUCCEEDED", "FAILED")
        assert record.state == "SUCCEEDED", record.message
        status = subprocess.run(
            [sys.executable, "-m", "tandem", "status"],
            env={**os.environ, **environment, "TANDEM_HOME": str(volume.home)},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "running" in status
        wait_for(lambda: "ready" in (volume.home / "worker.log").read_text())
        for text in (status, (volume.home / "worker.log").read_text()):
            assert SECRET not in text
            assert ENCODED not in text
        for path in volume.home.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    finally:
        bench.stop()


def test_up_takes_a_broker_with_a_password_and_writes_it_nowhere(serve: Serve, tmp_path: Path) -> None:
    port = free_port()
    serve(port=str(port), requirepass=SECRET)
    shell = Shell(tmp_path / "home", {"TANDEM_REDIS_URL": f"redis://:x@127.0.0.1:{port}/0"})
    assert "does not accept the user and password" in shell.error("up", "--no-tensorboard")
    assert "does not accept the user and password" in shell("status").stdout.replace("\n", "")
    findings = {finding["name"]: finding for finding in shell.json("doctor")}
    assert "does not accept the user and password" in findings["broker"]["remedy"]
    shell.environment["TANDEM_REDIS_URL"] = f"redis://:{ENCODED}@127.0.0.1:{port}/0"
    shell("up", "--detach", "--no-tensorboard")
    try:
        status = shell("status", "--json").stdout
        assert '"broker": {"running": true' in " ".join(status.split())
        assert f"redis://127.0.0.1:{port}/0" in status
        for text in (status, *(path.read_text() for path in (shell.home / "local").iterdir() if path.is_file())):
            assert SECRET not in text
            assert ENCODED not in text
    finally:
        shell("down")


def test_a_worker_outlives_a_broker_that_takes_no_writes_for_a_while(serve: Serve, tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    volume.home.mkdir()
    write_text_dataset(volume, "words")
    port = free_port()
    process = serve(port=str(port)).process
    assert process is not None
    bench = Bench(volume, f"redis://127.0.0.1:{port}/0", process)
    try:
        worker = bench.start_worker()
        wait_for(lambda: "ready" in (volume.home / "worker.log").read_text())
        _execute(port, "REPLICAOF", "127.0.0.1", "1")
        wait_for(lambda: "read only replica" in (volume.home / "worker.log").read_text())
        time.sleep(2.0)
        _execute(port, "REPLICAOF", "NO", "ONE")
        assert bench.wait_for_state(bench.language_model(), "SUCCEEDED", "FAILED").state == "SUCCEEDED"
        assert worker.poll() is None
    finally:
        bench.stop()
