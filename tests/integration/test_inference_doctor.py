"""`tandem doctor` about a server that runs: what it finds, and the remedy."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import png, publish_classifier
from inference_server import ServerProcess, start_server
from waiting import PATIENCE_S, wait_for

from tandem.access import ClientAccess
from tandem.cli.doctor_inference import inference_findings
from tandem.cli.findings import Finding
from tandem.client import Client
from tandem.settings import Settings
from tandem.volume import Volume


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server with a classifier `good`, one with a broken newest version, and one that can't be served at all."""
    volume = Volume(tmp_path / "home")
    for name, run_id in (("good", "run-1"), ("worse", "run-2"), ("broken", "run-3")):
        publish_classifier(volume, name, run_id)
    damage(volume, "run-3")
    tokens = tmp_path / "tokens"
    tokens.write_text("predict,admin 0123456789abcdef\n")
    tokens.chmod(0o600)
    server = start_server(
        tmp_path, volume, TANDEM_ENGINE="eager", TANDEM_METRICS_LISTEN="127.0.0.1:0", TANDEM_TOKENS_FILE=str(tokens)
    )
    try:
        yield server
    finally:
        server.kill()


def damage(volume: Volume, run_id: str) -> None:
    (weights,) = volume.run(run_id).rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")


def findings(server: ServerProcess, **environment: str) -> dict[str, Finding]:
    settings = Settings.from_environment({"TANDEM_HOME": str(server.volume.home), **environment})
    return {finding.name: finding for finding in inference_findings(settings, server.address)}


def test_doctor_says_what_is_wrong_with_a_server_that_runs(server: ServerProcess, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    (metrics,) = re.findall(r"metrics on http://([\d.:]+)/", server.log.read_text())
    # Without a token it is not let in.
    found = findings(server)
    assert found["inference access"].state == "bad"
    assert "TANDEM_TOKEN_FILE" in found["inference access"].remedy
    assert (found["inference TLS"].state, found["inference metrics"].state) == ("ok", "off")

    with Client(server.address, access=ClientAccess(token_file=token)) as client:
        client.wait_until_serving("good", timeout_s=PATIENCE_S)
        client.classify("worse", [png(0)])
        publish_classifier(server.volume, "worse", "run-4")
        damage(server.volume, "run-4")
        wait_for(lambda: "worse:2 can't be loaded" in server.log.read_text())
    found = findings(server, TANDEM_TOKEN_FILE=str(token), TANDEM_METRICS_LISTEN=metrics)
    assert found["inference access"].state == "ok"
    assert "model good" not in found
    assert (found["model broken"].state, found["model worse"].state) == ("bad", "bad")
    assert "nothing is served" in found["model broken"].detail
    assert "version 1 is served in its place" in found["model worse"].detail
    assert found["inference metrics"].state == "ok"
    assert re.search(r"2 versions in memory, \d+ loads failed", found["inference metrics"].detail)
