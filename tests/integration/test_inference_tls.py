"""TLS, certificates and tokens with a real server in a process of its own; the commands and both clients call it."""

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from brokers import Certificates, free_port
from factories import png, publish_classifier, publish_language_model
from grpc_health.v1 import health_pb2, health_pb2_grpc
from inference_server import COMMAND, ROOT, ServerProcess, environment, refused_start, start_server
from waiting import PATIENCE_S, wait_for

from tandem.client import AsyncClient, Client, ClientAccess, GenerationSummary
from tandem.errors import DeadlineExceeded, InvalidRequest, PermissionDenied, ServerUnavailable, Unauthenticated
from tandem.volume import Volume
from tandem.wire.channel import open_channel

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl: apt-get install openssl")

PREDICTS, ADMINISTERS, REVOKED = "predict-token-of-the-test", "admin-token-of-the-test-1", "revoked-token-of-the-test"
NAMES = "DNS:localhost,IP:127.0.0.1"


@dataclass(frozen=True)
class Site:
    """A server with mutual TLS and tokens, and all that its clients may hold."""

    server: ServerProcess
    certificates: Certificates
    crt: Path
    key: Path
    tokens: Path
    directory: Path

    def access(self, token: str | None = PREDICTS, **changes: Path | None) -> ClientAccess:
        files: dict[str, Path | None] = {"ca_file": self.certificates.ca, "cert_file": self.crt, "key_file": self.key}
        if token is not None:
            path = files["token_file"] = self.directory / f"{token}.token"
            path.write_text(f"{token}\n")
        return ClientAccess(**{**files, **changes})  # type: ignore[arg-type]

    def client(self, access: ClientAccess | None = None) -> Client:
        return Client(self.server.address, 20.0, access or self.access())


def authority(directory: Path) -> Certificates:
    directory.mkdir()
    return Certificates(directory)


def token_lines(*tokens: str) -> str:
    return f"# of the test\npredict {PREDICTS}\nadmin {ADMINISTERS}\n" + "".join(f"predict {each}\n" for each in tokens)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("tls")
    volume = Volume(directory / "home")
    publish_classifier(volume, "pictures", "run-c")
    publish_language_model(volume, "words", "run-l")
    certificates = authority(directory / "ca")
    crt, key = certificates.sign("server", NAMES)
    client_crt, client_key = certificates.sign("client", "DNS:client")
    key.chmod(0o600)
    tokens = directory / "tokens"
    tokens.write_text(token_lines(REVOKED))
    tokens.chmod(0o600)
    server = start_server(
        directory,
        volume,
        TANDEM_TLS_CERT_FILE=str(crt),
        TANDEM_TLS_KEY_FILE=str(key),
        TANDEM_TLS_CLIENT_CA_FILE=str(certificates.ca),
        TANDEM_TOKENS_FILE=str(tokens),
    )
    site = Site(server, certificates, client_crt, client_key, tokens, directory)
    try:
        with site.client() as client:
            client.wait_until_serving("pictures", timeout_s=PATIENCE_S)
            client.wait_until_serving("words", timeout_s=PATIENCE_S)
        yield site
        assert server.stop() == 0
    finally:
        server.kill()
    log = server.log.read_text()
    assert "Traceback" not in log
    for token in (PREDICTS, ADMINISTERS, REVOKED, "unknown-token"):
        assert token not in log


# What works


def test_the_blocking_client(site: Site) -> None:
    with site.client() as client:
        assert not client.classify("pictures", [png(0)]).results[0].error
        *_, last = client.generate("words", None, 20)
        assert isinstance(last, GenerationSummary)
        assert [model.name for model in client.list_models()] == ["pictures", "words"]
        assert client.get_model("words").kind == "language_model"


async def test_the_client_for_asyncio(site: Site) -> None:
    async with AsyncClient(site.server.address, access=site.access()) as client:
        await client.wait_until_serving("pictures", timeout_s=PATIENCE_S)
        assert not (await client.classify("pictures", [png(0)])).results[0].error
        *_, last = [step async for step in client.generate("words", None, 20)]
        assert isinstance(last, GenerationSummary)
    async with AsyncClient(site.server.address, access=site.access(None)) as client:
        with pytest.raises(Unauthenticated, match="TANDEM_TOKEN_FILE"):
            await client.wait_until_serving("pictures", timeout_s=PATIENCE_S)


def command(site: Site, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    access = site.access()
    variables = {
        "TANDEM_HOME": str(site.directory / "nobody"),
        "TANDEM_INFERENCE_ADDRESS": site.server.address,
        "TANDEM_TLS_CA_FILE": str(access.ca_file),
        "TANDEM_TLS_CLIENT_CERT_FILE": str(access.cert_file),
        "TANDEM_TLS_CLIENT_KEY_FILE": str(access.key_file),
        "TANDEM_TOKEN_FILE": str(access.token_file),
    }
    return subprocess.run(
        [sys.executable, "-m", "tandem", *arguments],
        env=environment(**{**variables, **changes}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_command_that_calls_the_server(site: Site) -> None:
    picture = site.directory / "a.png"
    picture.write_bytes(png(0))
    for arguments in (
        ("classify", "pictures", str(picture)),
        ("compare", "pictures", "pictures", str(picture)),
        ("generate", "words", "--words", "5"),
    ):
        done = command(site, *arguments)
        assert done.returncode == 0, (arguments, done.stderr)
    status = command(site, "status")
    assert f"running  {site.server.address}" in " ".join(status.stdout.split()).replace(" running ", " running  ")


def test_a_command_without_its_credentials_says_what_it_needs(site: Site) -> None:
    picture = site.directory / "b.png"
    picture.write_bytes(png(0))
    for changes, says in (
        ({"TANDEM_TOKEN_FILE": ""}, "TANDEM_TOKEN_FILE"),
        ({"TANDEM_TLS_CA_FILE": str(site.crt)}, "of no authority in TANDEM_TLS_CA_FILE"),
        ({"TANDEM_TLS_CLIENT_KEY_FILE": ""}, "go together"),
    ):
        done = command(site, "classify", "pictures", str(picture), **changes)
        (line,) = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (1, "")
        assert line.startswith("tandem: ")
        assert says in line
        assert PREDICTS not in line
    status = command(site, "status", TANDEM_TLS_CLIENT_CERT_FILE="", TANDEM_TLS_CLIENT_KEY_FILE="")
    assert "hung up: if it wants a certificate of its clients" in " ".join(status.stdout.split())


# What is refused


def test_callers_with_the_wrong_credentials_are_told_so(site: Site, tmp_path: Path) -> None:
    other = authority(tmp_path / "other")
    other_crt, other_key = other.sign("client", "DNS:client")
    plain = ClientAccess()
    for access, says in (
        (site.access(ca_file=other.ca), "of no authority in TANDEM_TLS_CA_FILE"),
        (site.access(cert_file=None, key_file=None), "wants a certificate of its clients"),
        (site.access(cert_file=other_crt, key_file=other_key), "wants a certificate of its clients"),
        (plain, "if it speaks TLS, name the authority"),
    ):
        with site.client(access) as client, pytest.raises(ServerUnavailable, match=says):
            client.list_models()
    with site.client(site.access(ca_file=other.ca)) as client, pytest.raises(ServerUnavailable, match="no authority"):
        client.wait_until_serving(timeout_s=PATIENCE_S)
    with site.client(plain) as client, pytest.raises(DeadlineExceeded, match=r"after 1 s: .* if it speaks TLS"):
        client.wait_until_serving(timeout_s=1.0)
    with pytest.raises(InvalidRequest, match="are no certificate with its key"):
        site.client(site.access(cert_file=other_crt))


def test_a_client_with_tls_at_a_server_without(tmp_path: Path, site: Site) -> None:
    server = start_server(tmp_path, Volume(tmp_path / "home"))
    try:
        with (
            Client(server.address, access=site.access(None)) as client,
            pytest.raises(ServerUnavailable, match="does not speak TLS: leave TANDEM_TLS_CA_FILE out"),
        ):
            client.list_models()
    finally:
        server.kill()


def test_tokens_and_scopes(site: Site) -> None:
    with site.client(site.access(None)) as client:
        # The whole's health is for probes, a model's is not.
        client.wait_until_serving(timeout_s=PATIENCE_S)
        for model in ("pictures", "no-such-model"):
            with pytest.raises(Unauthenticated, match="wants a token with each call") as caught:
                client.get_model(model)
            assert model not in str(caught.value)
            with pytest.raises(Unauthenticated):
                client.wait_until_serving(model, timeout_s=PATIENCE_S)
    with (
        site.client(site.access("unknown-token-of-nobody")) as client,
        pytest.raises(Unauthenticated, match="does not know the token"),
    ):
        client.classify("pictures", [png(0)])
    with (
        site.client(site.access(ADMINISTERS)) as client,
        pytest.raises(PermissionDenied, match=r"lacks the scope predict, which tandem\.v1\.Inference/Classify needs"),
    ):
        client.classify("pictures", [png(0)])


def test_health_and_reflection_name_no_model_to_strangers(site: Site) -> None:
    channel = open_channel(site.server.address, site.access(None))
    try:
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
        for call in (
            lambda: health.Check(health_pb2.HealthCheckRequest(service="models/pictures"), timeout=5),
            lambda: list(health.Watch(health_pb2.HealthCheckRequest(service="models/none"), timeout=5)),
            lambda: channel.unary_unary("/tandem.v1.Models/NoSuchMethod")(b"", timeout=5),
            lambda: channel.unary_unary("/grpc.health.v1.Health/List")(b"", timeout=5),
            lambda: list(
                channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(
                    iter([b":\x00"]), timeout=5
                )
            ),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            refused: Any = caught.value
            assert refused.code() == grpc.StatusCode.UNAUTHENTICATED
            assert "pictures" not in refused.details()
    finally:
        channel.close()


def test_a_stranger_is_refused_before_the_request_is_read(site: Site) -> None:
    channel = open_channel(site.server.address, site.access(None))
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 200:
            sent += 1
            yield bytes(1024 * 1024)

    try:
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary("/tandem.v1.Inference/Classify")(endless(), timeout=240)
        refused: Any = caught.value
        assert refused.code() == grpc.StatusCode.UNAUTHENTICATED
    finally:
        channel.close()
    # The window of the connection is open a little; what does not fit waits for a reader who never comes.
    assert sent < 100


# What changes while it runs


def test_a_revoked_token_is_refused_within_seconds(site: Site) -> None:
    with site.client(site.access(REVOKED)) as client:
        client.list_models()
        site.tokens.write_text(token_lines())
        wait_for(lambda: is_refused(client))
        # A half-written file changes nothing.
        site.tokens.write_text("predict ")
        time.sleep(1.5)
        assert is_refused(client)
        with site.client() as other:
            other.list_models()
        site.tokens.write_text(token_lines(REVOKED))
        wait_for(lambda: not is_refused(client))
    assert site.server.log.read_text().count("the tokens were changed, and those before go on being used") == 1


def is_refused(client: Client) -> bool:
    try:
        client.list_models()
    except Unauthenticated:
        return True
    return False


def serial(address: str, site: Site) -> int:
    """Return the serial number of the certificate that the server shows."""
    host, port = address.rsplit(":", 1)
    context = ssl.create_default_context(cafile=site.certificates.ca)
    context.load_cert_chain(site.crt, site.key)
    with (
        socket.create_connection((host, int(port)), 5) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        found: Any = tls.getpeercert()
        return int(found["serialNumber"], 16)


def test_a_renewed_certificate_needs_no_restart_and_half_a_pair_changes_nothing(site: Site) -> None:
    crt, key = site.certificates.directory / "server.crt", site.certificates.directory / "server.key"
    old = serial(site.server.address, site)
    new_crt, new_key = site.certificates.sign("renewed", NAMES)
    kept = site.client()
    try:
        kept.list_models()
        shutil.copy(new_crt, crt)
        # The key is still the old one.
        assert [serial(site.server.address, site) for _ in range(3)] == [old] * 3
        with site.client() as client:
            client.list_models()
        shutil.copy(new_key, key)
        assert serial(site.server.address, site) != old
        crt.write_bytes(new_crt.read_bytes()[:100])
        assert serial(site.server.address, site) != old
        with site.client() as client:
            client.list_models()
        # Calls on a connection that stands went on all the while.
        kept.list_models()
    finally:
        kept.close()
        shutil.copy(new_crt, crt)
    log = site.server.log.read_text()
    assert log.count("the certificate was changed, and the one before goes on being used") == 2
    assert "is in use from now on" in log


def test_an_expired_certificate_is_told_by_clients(site: Site) -> None:
    directory = site.certificates.directory
    crt = directory / "server.crt"
    valid = crt.read_bytes()
    shutil.copy(directory / "renewed.csr", directory / "expired.csr")
    subprocess.run(
        [
            *"openssl x509 -req -in expired.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days -1".split(),
            *("-extfile", "renewed.ext", "-out", "expired.crt"),
        ],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    try:
        shutil.copy(directory / "expired.crt", crt)
        with site.client() as client, pytest.raises(ServerUnavailable, match="its certificate has expired"):
            client.list_models()
    finally:
        crt.write_bytes(valid)
    with site.client() as client:
        client.list_models()


def test_a_certificate_for_another_name_is_told_by_clients(tmp_path: Path) -> None:
    certificates = authority(tmp_path / "ca")
    crt, key = certificates.sign("server", "DNS:example.org")
    server = start_server(
        tmp_path, Volume(tmp_path / "home"), TANDEM_TLS_CERT_FILE=str(crt), TANDEM_TLS_KEY_FILE=str(key)
    )
    try:
        with (
            Client(server.address, access=ClientAccess(ca_file=certificates.ca)) as client,
            pytest.raises(ServerUnavailable, match="for another name"),
        ):
            client.list_models()
    finally:
        server.kill()


# How it starts


def test_what_it_does_not_start_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))

    def refused(listen: str = "127.0.0.1:0", **variables: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            return refused_start(patch, capsys, "--listen", listen)

    certificates = authority(tmp_path / "ca")
    crt, _ = certificates.sign("one", NAMES)
    _, key = certificates.sign("two", NAMES)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"predict {PREDICTS}")
    tokens.chmod(0o644)
    pair = {"TANDEM_TLS_CERT_FILE": str(crt), "TANDEM_TLS_KEY_FILE": str(key)}
    assert "are no certificate with its key in PEM: key values mismatch" in refused(**pair)
    assert "TANDEM_TLS_KEY_FILE go together" in refused(TANDEM_TLS_CERT_FILE=str(crt))
    line = refused(TANDEM_TOKENS_FILE=str(tokens))
    assert "others than its owner can read: chmod 600" in line
    assert PREDICTS not in line
    line = refused("0.0.0.0:0")
    assert "is not a loopback address" in line
    assert "TANDEM_TLS_CERT_FILE" in line


def test_with_tls_it_listens_elsewhere_and_says_who_may_call(tmp_path: Path) -> None:
    certificates = authority(tmp_path / "ca")
    crt, key = certificates.sign("server", NAMES)
    port, log = free_port(), tmp_path / "log"
    variables = {"TANDEM_TLS_CERT_FILE": str(crt), "TANDEM_TLS_KEY_FILE": str(key)}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*COMMAND, "--listen", f"0.0.0.0:{port}", "--home", str(tmp_path / "home")],
            env=environment(**variables),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with Client(f"localhost:{port}", access=ClientAccess(ca_file=certificates.ca)) as client:
            client.wait_until_serving(timeout_s=PATIENCE_S)
            assert client.list_models() == []
    finally:
        process.terminate()
        assert process.wait(240) == 0
    assert "without TANDEM_TOKENS_FILE: anyone who reaches it may make every call" in log.read_text()


# HTTP/2


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def test_a_connection_that_pings_without_end_is_closed(tmp_path: Path) -> None:
    server = start_server(tmp_path, Volume(tmp_path / "home"))
    received = b""
    try:
        host, port = server.address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 10) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
            with contextlib.suppress(ConnectionError):
                while b"too_many_pings" not in received:
                    connection.sendall(frame(6, 0, 0, bytes(8)))
                    more = connection.recv(65_536)
                    assert more, "the connection was closed without a word"
                    received += more
        # GOAWAY with ENHANCE_YOUR_CALM.
        assert b"too_many_pings" in received
        assert struct.pack(">I", 11) + b"too_many_pings" in received
        # SETTINGS with MAX_CONNECTION_CALLS.
        assert struct.pack(">HI", 3, 1024) in received
        with Client(server.address) as client:
            client.wait_until_serving(timeout_s=PATIENCE_S)
    finally:
        server.kill()


async def test_a_message_over_the_limit_ends_its_call_alone(site: Site) -> None:
    channel = open_channel(site.server.address, site.access())
    classify = channel.unary_unary("/tandem.v1.Inference/Classify")
    generate = channel.unary_unary("/tandem.v1.Inference/Generate")
    try:
        for call, size, code in (
            (generate, 3 * 1024 * 1024, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (classify, 3 * 1024 * 1024, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.to_thread(call, os.urandom(size), timeout=240)
            refused: Any = caught.value
            assert refused.code() == code
            assert "Traceback" not in refused.details()
    finally:
        channel.close()
    async with AsyncClient(site.server.address, access=site.access()) as client:
        assert not (await client.classify("pictures", [png(0)])).results[0].error
