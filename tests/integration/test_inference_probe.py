"""`python -m services.inference.probe`, as a health check calls it: beside a server, in its environment."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import Certificates, free_port
from inference_server import ROOT, ServerProcess, environment, start_server
from waiting import wait_for

from tandem.volume import Volume

openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl: apt-get install openssl")


def probe(server: "ServerProcess | str", **changes: str) -> "subprocess.CompletedProcess[str]":
    address = server if isinstance(server, str) else server.address
    return subprocess.run(
        [sys.executable, "-m", "services.inference.probe"],
        cwd=ROOT,
        env=environment(TANDEM_LISTEN=address, **changes),
        capture_output=True,
        text=True,
        timeout=120,
    )


def line_of(result: "subprocess.CompletedProcess[str]") -> str:
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[tuple[ServerProcess, dict[str, str]]]:
    """A server with a certificate for other names than ours, which wants certificates and tokens of clients."""
    certificates = Certificates(tmp_path)
    crt, key = certificates.sign("server", "DNS:*.models.example")
    shown, shown_key = certificates.sign("client", "DNS:client")
    tokens = tmp_path / "tokens"
    tokens.write_text("predict a-token-of-the-test\n")
    tokens.chmod(0o600)
    variables = {
        "TANDEM_TLS_CERT_FILE": str(crt),
        "TANDEM_TLS_KEY_FILE": str(key),
        "TANDEM_TLS_CLIENT_CA_FILE": str(certificates.ca),
        "TANDEM_TOKENS_FILE": str(tokens),
    }
    server = start_server(tmp_path / "server", Volume(tmp_path / "home"), **variables)
    # The probe's own, as a deployment would give them to the container.
    variables |= {"TANDEM_TLS_CLIENT_CERT_FILE": str(shown), "TANDEM_TLS_CLIENT_KEY_FILE": str(shown_key)}
    try:
        yield server, {**variables, "TANDEM_TLS_CA_FILE": str(certificates.ca)}
    finally:
        server.kill()


def test_a_server_that_serves_is_well_and_one_that_hangs_or_is_gone_is_not(tmp_path: Path) -> None:
    port = free_port()
    everywhere = {"listen": f"0.0.0.0:{port}", "TANDEM_ALLOW_INSECURE_LISTEN": "1"}
    server = start_server(tmp_path, Volume(tmp_path / "home"), **everywhere)
    try:
        wait_for(lambda: probe(server).returncode == 0, "health")
        server.process.send_signal(19)
        assert "Deadline Exceeded" in line_of(probe(server))
        server.process.send_signal(18)
    finally:
        server.kill()
    assert f"no answer at 127.0.0.1:{port}" in line_of(probe(server))


@openssl
def test_an_encrypted_server_is_asked_by_its_own_certificate(
    encrypted: tuple[ServerProcess, dict[str, str]],
) -> None:
    server, variables = encrypted
    wait_for(lambda: probe(server, **variables).returncode == 0, "health")
    without = {
        name: value for name, value in variables.items() if "_TLS_CLIENT_CERT" not in name and "_CLIENT_KEY" not in name
    }
    assert "no answer" in line_of(probe(server, **without))


@openssl
def test_a_certificate_without_a_name_is_told(tmp_path: Path) -> None:
    crt, key = Certificates(tmp_path).sign("server", "email:nobody@models.example")
    line = line_of(probe("127.0.0.1:1", TANDEM_TLS_CERT_FILE=str(crt), TANDEM_TLS_KEY_FILE=str(key)))
    assert f"TANDEM_TLS_CERT_FILE={crt} names no host" in line
