"""The server as a process: how it starts, what it refuses, how it stops."""

import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from factories import png, publish_classifier, publish_language_model
from inference_server import COMMAND, ROOT, environment, start_server, wait_for

from tandem.client import Client, GenerationSummary, SamplingOptions, TextPiece
from tandem.errors import TandemError
from tandem.volume import Volume


def refused(tmp_path: Path, *arguments: str, **changes: str) -> str:
    """Run a server that is to exit with 1; return its one line."""
    done = subprocess.run(
        [*COMMAND, "--home", str(tmp_path), *arguments],
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(tmp_path, "--listen", f"127.0.0.1:{port}")
    assert line.startswith(f"tandem: can't listen on 127.0.0.1:{port}: Address already in use; choose another")


def test_other_machines_are_kept_out(tmp_path: Path) -> None:
    line = refused(tmp_path, "--listen", "0.0.0.0:0")
    assert "not a loopback address" in line
    assert "TANDEM_ALLOW_INSECURE_LISTEN" in line


def test_nonsense_in_the_environment_is_one_clear_line(tmp_path: Path) -> None:
    assert "TANDEM_DEVICE='tpu'" in refused(tmp_path, "--listen", "127.0.0.1:0", TANDEM_DEVICE="tpu")


def test_a_text_under_way_is_finished_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    publish_language_model(volume, "words", "run-l")
    # A broker that is not there must not matter.
    server = start_server(tmp_path, volume, TANDEM_REDIS_URL="redis://127.0.0.1:1/0")
    try:
        with Client(server.address) as client:
            client.wait_until_serving("words")
            steps = client.generate("words", None, 2000, SamplingOptions(seed=1))
            assert isinstance(next(steps), TextPiece)
            server.process.send_signal(signal.SIGTERM)
            *_, last = steps
            assert isinstance(last, GenerationSummary)
            assert last.num_words == 2000
            assert server.process.wait(10) == 0
            with pytest.raises(TandemError):
                client.list_models()
    finally:
        server.kill()
    log = server.log.read_text()
    assert "Traceback" not in log
    assert log.count("Redis does not answer") == 1
    assert server.address in log


def test_interrupted_with_an_endless_text_it_stops_in_its_grace(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    publish_language_model(volume, "words", "run-l", "Transformer")
    publish_classifier(volume, "pictures", "run-c")
    server = start_server(tmp_path, volume, TANDEM_LOG_LEVEL="WARNING")
    failures: list[TandemError] = []

    def read_on(client: Client) -> None:
        try:
            for _ in client.generate("words", None, 100_000):
                pass
        except TandemError as error:
            failures.append(error)

    try:
        with Client(server.address) as client:
            client.wait_until_serving("pictures")
            reader = threading.Thread(target=read_on, args=(client,))
            reader.start()
            assert not client.classify("pictures", [png(0)]).results[0].error
            assert server.stop(signal.SIGINT, timeout_s=9) == 0
            reader.join(5)
            wait_for(lambda: len(failures) == 1)
    finally:
        server.kill()
    # At WARNING nothing is said but where it listens.
    assert server.log.read_text() == f"listening on {server.address}\n"
