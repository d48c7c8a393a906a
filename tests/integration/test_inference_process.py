"""The server as a process: how it starts, what it refuses, how it stops."""

import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from factories import png, publish_classifier, publish_language_model
from inference_server import refused_start, start_server
from waiting import PATIENCE_S, wait_for

from services.inference.listening import check_loopback
from services.inference.server import running_server
from tandem.client import Client, GenerationSummary, SamplingOptions, TextPiece
from tandem.errors import Conflict, ServerUnavailable, TandemError
from tandem.settings import Settings, parse_listen
from tandem.volume import Volume


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    for name in ("TANDEM_LISTEN", "TANDEM_DEVICE", "TANDEM_ALLOW_INSECURE_LISTEN", "TANDEM_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def test_a_port_in_use_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused_start(monkeypatch, capsys, "--listen", f"127.0.0.1:{port}")
    assert line.startswith(f"tandem: can't listen on 127.0.0.1:{port}: Address already in use; choose another")


async def test_two_servers_never_share_a_port(tmp_path: Path) -> None:
    settings = Settings.from_environment({"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(tmp_path)})
    async with running_server(settings) as first:
        with pytest.raises(Conflict, match="Address already in use"):
            async with running_server(replace(settings, listen=first.address)):
                pass


@pytest.mark.parametrize(
    ("listen", "says"),
    [
        ("0.0.0.0:0", "not a loopback address"),
        ("192.0.2.1:0", "TANDEM_ALLOW_INSECURE_LISTEN=1"),
        ("[::]:0", "not a loopback address"),
        ("example.org:80", "not a loopback address"),
        ("127.0.0.1", "write HOST:PORT"),
        (":8500", "write HOST:PORT"),
        ("127.0.0.1:99999", "write HOST:PORT"),
        ("127.0.0.1:http", "write HOST:PORT"),
    ],
)
def test_addresses_that_make_no_sense_or_open_a_door(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], listen: str, says: str
) -> None:
    assert says in refused_start(monkeypatch, capsys, "--listen", listen)


def test_where_the_network_is_closed_it_may_listen_to_all() -> None:
    check_loopback("0.0.0.0", allow_insecure=True)
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
        check_loopback(host, allow_insecure=False)
    assert parse_listen("[::1]:8500") == ("::1", 8500)


@pytest.mark.parametrize(
    ("name", "value"), [("TANDEM_DEVICE", "tpu"), ("TANDEM_LOG_LEVEL", "LOUD"), ("TANDEM_ENGINE", "onnx")]
)
def test_nonsense_in_the_environment_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert f"{name}={value!r}" in refused_start(monkeypatch, capsys, "--listen", "127.0.0.1:0")


def test_a_text_under_way_is_finished_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    publish_language_model(volume, "words", "run-l")
    # A broker that is not there must not matter.
    server = start_server(tmp_path, volume, TANDEM_REDIS_URL="redis://127.0.0.1:1/0")
    try:
        with Client(server.address) as client:
            client.wait_until_serving("words", timeout_s=PATIENCE_S)
            steps = client.generate("words", None, 1000, SamplingOptions(seed=1))
            assert isinstance(next(steps), TextPiece)
            server.process.send_signal(signal.SIGTERM)
            *_, last = steps
            assert isinstance(last, GenerationSummary)
            assert last.num_words == 1000
            assert server.process.wait(120) == 0
            with pytest.raises(TandemError):
                client.list_models()
    finally:
        server.kill()
    log = server.log.read_text()
    assert "Traceback" not in log
    # Said once, if there was the time for it.
    assert log.count("until then the volume is looked at each second") <= 1
    assert server.address in log


def test_interrupted_with_an_endless_text_it_stops_in_its_grace(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    publish_language_model(volume, "words", "run-l", "Transformer")
    publish_classifier(volume, "pictures", "run-c")
    server = start_server(tmp_path, volume, TANDEM_LOG_LEVEL="WARNING", TANDEM_SLOW_REQUEST_MS="0")
    failures: list[TandemError] = []

    def read_on(client: Client) -> None:
        try:
            for _ in client.generate("words", None, 100_000):
                pass
        except TandemError as error:
            failures.append(error)

    try:
        with Client(server.address) as client:
            client.wait_until_serving("pictures", timeout_s=PATIENCE_S)
            reader = threading.Thread(target=read_on, args=(client,))
            reader.start()
            assert not client.classify("pictures", [png(0)]).results[0].error
            assert server.stop(signal.SIGINT) == 0
            reader.join(60)
            wait_for(lambda: len(failures) == 1)
    finally:
        server.kill()
    # At WARNING nothing is said but where it listens, and what was given up.
    listens, given_up = server.log.read_text().splitlines()
    assert listens == f"listening on {server.address}"
    assert given_up.endswith("WARNING calls given up after 5 s: 1")


def test_a_text_that_the_servers_death_cuts_off_says_so(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    publish_language_model(volume, "words", "run-l")
    server = start_server(tmp_path, volume)
    try:
        with Client(server.address) as client:
            client.wait_until_serving("words", timeout_s=PATIENCE_S)
            steps = client.generate("words", None, 100_000)
            next(steps)
            server.kill()
            with pytest.raises(ServerUnavailable, match=rf"{server.address} was lost after [\d,]+ words"):
                list(steps)
            with pytest.raises(ServerUnavailable, match="no inference server answers"):
                list(client.generate("words"))
    finally:
        server.kill()
