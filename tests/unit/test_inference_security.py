"""Who may call, and what a request may hold: tokens, scopes, TLS files, messages; nothing here opens a socket."""

import contextlib
import hashlib
import hmac
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.authorization import OPEN, Authorization, scope_of
from services.inference.boundary import Boundary
from services.inference.listening import check_loopback, warn_of_open_doors
from services.inference.messages import count_parts
from services.inference.oip.servicer import OpenInferenceServicer
from services.inference.servicers import InferenceServicer, ModelsServicer
from services.inference.tokens import ADMIN, PREDICT, RECHECK_S, TokenFile, parse_tokens, read_tokens
from tandem.access import ClientAccess, Credentials, ServerAccess, client_access, read_credentials, server_access
from tandem.errors import InvalidRequest, ServerUnavailable, Unauthenticated
from tandem.wire.handshakes import is_final, tls_problem
from tandem.wire.limits import MAX_PARTS, MAX_TEXT_MESSAGE_BYTES, MAX_TYPED_BYTES
from tandem.wire.oip import grpc_service_pb2 as oip
from tandem.wire.oip.grpc_service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server as add_open_inference
from tandem.wire.status import DETAILS_KEY, from_rpc_error
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

TOKEN, OTHER = "a-token-of-the-test-01", "a-token-of-the-test-02"
HASHED = f"sha256:{hashlib.sha256(OTHER.encode()).hexdigest()}"


def token_file(directory: Path, text: str = f"predict {TOKEN}\nadmin {HASHED}\n", mode: int = 0o600) -> Path:
    path = directory / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return path


# Tokens


def test_a_token_has_the_scopes_of_its_line(tmp_path: Path) -> None:
    tokens = TokenFile(token_file(tmp_path, f"# people\n\npredict,admin {TOKEN}\n  predict  {HASHED}  \n"))
    assert tokens.scopes(TOKEN) == frozenset({PREDICT, ADMIN})
    assert tokens.scopes(OTHER) == frozenset({PREDICT})
    for wrong in ("", TOKEN[:-1], TOKEN + "x", HASHED, "predict", "\udcff" * 20):
        assert tokens.scopes(wrong) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no tokens"),
        ("# nobody\n", "has no tokens"),
        (f"predict {TOKEN}\nsecret-alone-on-its-line\n", "line 2: write 'scope"),
        (f"predict {TOKEN} tail-of-a-secret", "line 1: write 'scope"),
        (f"root {TOKEN}", "line 1: a scope is neither predict nor admin"),
        (f"predict, {TOKEN}", "line 1: a scope is neither"),
        ("predict short-secret", "line 1: the token has fewer than 16 signs"),
        ("predict sha256:abcd", "line 1: after sha256:"),
        (f"predict sha256:{'g' * 64}", "line 1: after sha256:"),
        (f"predict {OTHER}\n\nadmin {HASHED}", "line 3 has the token of line 1 again"),
    ],
)
def test_a_wrong_line_is_named_and_its_token_is_not(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        parse_tokens(text, Path("/x/tokens"))
    assert str(caught.value).startswith("TANDEM_TOKENS_FILE=/x/tokens ")
    assert "secret" not in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        (f"predict {TOKEN}", 0o640, "others than its owner can read"),
        (f"predict {TOKEN}", 0o604, "others than its owner can read"),
        (f"predict {HASHED}\nadmin {TOKEN}", 0o644, "others than its owner can read"),
        (f"predict {HASHED}", 0o620, "can be written by others"),
        (f"predict {HASHED}", 0o602, "can be written by others"),
    ],
)
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, text: str, mode: int, says: str) -> None:
    path = token_file(tmp_path, text, mode)
    with pytest.raises(InvalidRequest, match=says):
        read_tokens(path)
    path.chmod(0o600)
    assert read_tokens(path)


def test_digests_alone_are_no_secret(tmp_path: Path) -> None:
    assert len(read_tokens(token_file(tmp_path, f"predict {HASHED}", 0o644))) == 1


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="can't be read: No such file"):
        TokenFile(tmp_path / "none")
    path = token_file(tmp_path)
    path.write_bytes(b"predict \xff\xfe")
    with pytest.raises(InvalidRequest, match="no text in UTF-8"):
        TokenFile(path)


def test_a_changed_file_counts_within_a_second_and_a_broken_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    path = token_file(tmp_path)
    tokens = TokenFile(path, clock=lambda: now)
    path.write_text(f"predict {OTHER}\n")
    assert tokens.scopes(TOKEN) == frozenset({PREDICT})
    now += RECHECK_S
    assert tokens.scopes(TOKEN) is None
    assert tokens.scopes(OTHER) == frozenset({PREDICT})
    path.write_text("predict")
    for _ in range(3):
        now += RECHECK_S
        assert tokens.scopes(OTHER) == frozenset({PREDICT})
    path.unlink()
    now += RECHECK_S
    assert tokens.scopes(OTHER) == frozenset({PREDICT})
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "line 1" in errors[0]
    assert "No such file" in errors[1]


def test_every_entry_is_compared_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TokenFile(token_file(tmp_path, f"predict {TOKEN}\nadmin {HASHED}\npredict {'x' * 16}\n"))
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def counting(first: bytes, second: bytes) -> bool:
        compared.append(first)
        return compare(first, second)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for token in (TOKEN, "x" * 16, "unknown"):
        compared.clear()
        tokens.scopes(token)
        assert len(compared) == 3


# Scopes


class Aborted(grpc.aio.AbortError):
    """What `abort` raises."""


class FakeContext:
    """Remembers how the call was ended."""

    def __init__(self) -> None:
        self.ended: tuple[grpc.StatusCode, str, dict[str, Any]] | None = None

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def send_initial_metadata(self, metadata: Any) -> None:
        return None

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> NoReturn:
        self.ended = (code, details, dict(trailing_metadata))
        raise Aborted(details)


class FakeDetails:
    """Names the method that is called, with the headers."""

    def __init__(self, method: str, *headers: str | bytes) -> None:
        self.method = method
        self.invocation_metadata = tuple(("authorization", value) for value in headers)


async def called(tokens: TokenFile, method: str, *headers: str | bytes, known: bool = True) -> Any:
    """Return the status that a call is refused with, or the handler that it comes to."""
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, context: None)

    async def continuation(details: Any) -> Any:
        return handler if known else None

    got: Any = await Authorization(tokens).intercept_service(continuation, cast(Any, FakeDetails(method, *headers)))
    if got is None or not got.stream_stream:
        return got
    context = FakeContext()
    # Nobody reads the requests.
    with pytest.raises(Aborted):
        await got.stream_stream(None, context)
    assert context.ended is not None
    return context.ended[0]


def test_every_method_of_the_contract_has_its_scope() -> None:
    expected = {
        "Classify": PREDICT,
        "Compare": PREDICT,
        "CompareDataset": PREDICT,
        "Generate": PREDICT,
        "ListModels": PREDICT,
        "GetModel": PREDICT,
        "WatchModels": PREDICT,
        "GetShadows": PREDICT,
    }
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            # What changes the server, as Load and Unload do, is for admins.
            assert scope_of(f"/{service.full_name}/{method.name}") == expected.get(
                method.name, ADMIN if service.name == "Models" else PREDICT
            )
    for name in ("LoadModel", "UnloadModel", "SetAlias", "DeleteAlias", "StartShadow", "StopShadow", "SomethingNew"):
        assert scope_of(f"/tandem.v1.Models/{name}") == ADMIN
    for name in ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "SystemSharedMemoryRegister"):
        assert scope_of(f"/inference.GRPCInferenceService/{name}") == ADMIN
    open_to = {"ServerLive": OPEN, "ServerReady": OPEN, "RepositoryModelLoad": ADMIN, "RepositoryModelUnload": ADMIN}
    for method in oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        assert scope_of(f"/inference.GRPCInferenceService/{method.name}") == open_to.get(method.name, PREDICT)
    assert scope_of("/grpc.health.v1.Health/Check") == OPEN
    assert scope_of("/grpc.health.v1.Health/List") == PREDICT
    for unknown in ("/new.Service/Method", "", "/", "tandem.v1.Inference.Classify"):
        assert scope_of(unknown) == ADMIN


CLASSIFY, LOAD = "/tandem.v1.Inference/Classify", "/tandem.v1.Models/LoadModel"


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("",),
        (TOKEN,),
        (f"Basic {TOKEN}",),
        ("Bearer",),
        ("Bearer wrong-but-long-enough",),
        (f"Bearer {TOKEN} x",),
        (f"Bearer {TOKEN}", f"Bearer {TOKEN}"),
        (f"Bearer {TOKEN}".encode(),),
    ],
)
async def test_without_a_known_token_nothing_is_answered(tmp_path: Path, headers: tuple[str, ...]) -> None:
    tokens = TokenFile(token_file(tmp_path))
    for method in (CLASSIFY, LOAD, "/tandem.v1.Models/ListModels", "/grpc.reflection.v1alpha.ServerReflection/X"):
        for known in (True, False):
            assert await called(tokens, method, *headers, known=known) == grpc.StatusCode.UNAUTHENTICATED


async def test_scopes_let_through_what_they_name(tmp_path: Path) -> None:
    tokens = TokenFile(token_file(tmp_path))
    assert (await called(tokens, CLASSIFY, f"Bearer {TOKEN}")).unary_unary
    assert (await called(tokens, CLASSIFY, f"bearer   {TOKEN}")).unary_unary
    assert await called(tokens, LOAD, f"Bearer {TOKEN}") == grpc.StatusCode.PERMISSION_DENIED
    assert (await called(tokens, LOAD, f"Bearer {OTHER}")).unary_unary
    assert await called(tokens, CLASSIFY, f"Bearer {OTHER}") == grpc.StatusCode.PERMISSION_DENIED
    # UNIMPLEMENTED, as gRPC says it.
    assert await called(tokens, "/tandem.v1.Models/None", f"Bearer {TOKEN}", known=False) is None


@pytest.mark.parametrize("kind", ["Check", "Watch"])
async def test_health_of_the_whole_needs_no_token_and_that_of_a_model_does(tmp_path: Path, kind: str) -> None:
    answered: list[str] = []

    class Request:
        def __init__(self, service: str) -> None:
            self.service = service

    async def answer(request: Any, context: Any) -> None:
        answered.append(request.service)

    make = grpc.unary_unary_rpc_method_handler if kind == "Check" else grpc.unary_stream_rpc_method_handler
    inner: Any = make(cast(Any, answer))

    async def continuation(details: Any) -> Any:
        return inner

    async def ask(service: str, *headers: str) -> FakeContext:
        details = cast(Any, FakeDetails(f"/grpc.health.v1.Health/{kind}", *headers))
        handler: Any = await Authorization(TokenFile(token_file(tmp_path))).intercept_service(continuation, details)
        context = FakeContext()
        with contextlib.suppress(Aborted):
            await (handler.unary_unary or handler.unary_stream)(Request(service), context)
        return context

    for open_to_all in ("", "tandem.v1.Inference"):
        assert (await ask(open_to_all)).ended is None
    for name in ("models/there", "models/not-there"):
        ended = (await ask(name)).ended
        assert ended is not None
        assert ended[0] == grpc.StatusCode.UNAUTHENTICATED
        assert "there" not in ended[1]
    assert answered == ["", "tandem.v1.Inference"]
    assert (await ask("models/there", f"Bearer {TOKEN}")).ended is None


# What a person is told


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TANDEM_TLS_CERT_FILE": "c"}, "TANDEM_TLS_CERT_FILE and TANDEM_TLS_KEY_FILE go together"),
        ({"TANDEM_TLS_KEY_FILE": "k"}, "go together"),
        ({"TANDEM_TLS_CLIENT_CA_FILE": "a"}, "the server has no certificate"),
    ],
)
def test_half_of_the_servers_tls_is_refused(variables: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        server_access(variables)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TANDEM_TLS_CLIENT_CERT_FILE": "c", "TANDEM_TLS_CA_FILE": "a"}, "go together: set both"),
        ({"TANDEM_TLS_CLIENT_CERT_FILE": "c", "TANDEM_TLS_CLIENT_KEY_FILE": "k"}, "calls are not encrypted"),
    ],
)
def test_half_of_the_clients_tls_is_refused(variables: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        client_access(variables)


def test_an_open_environment_has_neither_tls_nor_tokens() -> None:
    assert server_access({}) == ServerAccess()
    assert client_access({"TANDEM_TLS_CA_FILE": ""}) == ClientAccess()
    assert read_credentials(ClientAccess(), "far:1") == Credentials()


def test_a_token_stays_out_of_the_clear(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    access = ClientAccess(token_file=path)
    for near in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/x"):
        assert read_credentials(access, near).token == TOKEN
    for far in ("10.0.0.1:1", "example.org:1", "localhost.example.org:1"):
        with pytest.raises(InvalidRequest, match=r"calls to .* are not encrypted: set TANDEM_TLS_CA_FILE"):
            read_credentials(access, far)
    allowed = client_access({"TANDEM_TOKEN_FILE": str(path), "TANDEM_ALLOW_INSECURE_TOKEN": "1"})
    assert read_credentials(allowed, "inference:8500").token == TOKEN
    encrypted = read_credentials(ClientAccess(ca_file=Path("public"), token_file=path), "example.org:1")
    assert (encrypted.is_encrypted, encrypted.root_certificates, encrypted.token) == (True, None, TOKEN)
    assert TOKEN not in repr(encrypted)


@pytest.mark.parametrize("content", [b"", b"\n", b"two secret words", b"secret\nsecret", "sécret".encode(), b"\xff"])
def test_a_token_that_no_header_can_carry_is_refused_without_being_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match="must hold the token alone") as caught:
        read_credentials(ClientAccess(token_file=path), "127.0.0.1:1")
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidRequest, match="can't be read: No such file"):
        read_credentials(ClientAccess(token_file=tmp_path / "none"), "127.0.0.1:1")


def test_an_authority_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "ca"
    path.write_text("no certificate")
    with pytest.raises(InvalidRequest, match=r"TANDEM_TLS_CA_FILE=.* is no certificate in PEM"):
        read_credentials(ClientAccess(ca_file=path), "far:1")


def test_open_doors_are_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    def told(host: str, access: ServerAccess) -> str:
        caplog.clear()
        warn_of_open_doors(host, access)
        return caplog.text

    tls, tokens = {"cert_file": tmp_path, "key_file": tmp_path}, {"tokens_file": tmp_path}
    assert told("127.0.0.1", ServerAccess()) == ""
    assert "without TANDEM_TOKENS_FILE: anyone who reaches it may make every call" in told("0.0.0.0", ServerAccess())
    mutual = ServerAccess(**tls, client_ca_file=tmp_path)
    assert "anyone with a certificate of TANDEM_TLS_CLIENT_CA_FILE" in told("0.0.0.0", mutual)
    assert "tokens can be read on the way" in told("0.0.0.0", ServerAccess(**tokens))
    assert told("0.0.0.0", ServerAccess(**tls, **tokens)) == ""
    with pytest.raises(InvalidRequest, match="TANDEM_TLS_CERT_FILE"):
        check_loopback("0.0.0.0", allow_insecure=False)


FAILED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "


@pytest.mark.parametrize(
    ("details", "is_encrypted", "says", "final"),
    [
        (FAILED + "CERTIFICATE_VERIFY_FAILED: certificate has expired", True, "has expired", True),
        (
            FAILED + "CERTIFICATE_VERIFY_FAILED: unable to get local issuer",
            True,
            "of no authority in TANDEM_TLS_CA",
            True,
        ),
        (FAILED + "Hostname Verification Check failed.", True, "for another name", True),
        (FAILED + "WRONG_VERSION_NUMBER", True, "does not speak TLS", True),
        (FAILED + "Socket closed", False, "if it speaks TLS, name the authority", False),
        (FAILED + "Socket closed", True, "wants a certificate of its clients", False),
        (FAILED + "Connection refused", True, "", False),
        ("Socket closed", False, "", False),
    ],
)
def test_what_a_failed_handshake_means(details: str, is_encrypted: bool, says: str, final: bool) -> None:
    problem = tls_problem(details, "host:1", is_encrypted)
    assert says in problem
    assert bool(says) == bool(problem)
    assert is_final(details) == final


class FakeRpcError(grpc.RpcError):
    """A status as it comes from a proxy: without our details."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


def test_statuses_of_others_become_errors_of_ours() -> None:
    unavailable = FakeRpcError(grpc.StatusCode.UNAVAILABLE, FAILED + "WRONG_VERSION_NUMBER")
    error = from_rpc_error(unavailable, "host:1", is_encrypted=True)
    assert isinstance(error, ServerUnavailable)
    assert "does not speak TLS" in str(error)
    assert isinstance(from_rpc_error(FakeRpcError(grpc.StatusCode.UNAUTHENTICATED, "no"), ""), Unauthenticated)


# Requests


def parts(images: int) -> bytes:
    """Return a ClassifyRequest with so many empty images."""
    return b"\x12\x00" * images


@given(st.lists(st.binary(max_size=20), max_size=30), st.text(max_size=200), st.integers(-(2**31), 2**31 - 1))
def test_parts_are_counted_as_the_parser_does(images: list[bytes], model: str, top_k: int) -> None:
    request = pb.ClassifyRequest(model=model, images=[pb.Image(data=data) for data in images], top_k=top_k)
    expected = len(images) + bool(model) + bool(top_k)
    assert count_parts(request.SerializeToString(), 10_000) == expected


@given(st.lists(st.binary(max_size=9), max_size=9), st.lists(st.text(max_size=9), max_size=9, unique=True))
def test_parts_of_tensors_are_counted_too(elements: list[bytes], names: list[str]) -> None:
    request = oip.ModelInferRequest(raw_input_contents=elements)
    tensor = request.inputs.add(name="n", shape=[1, 2], contents=oip.InferTensorContents(bytes_contents=elements))
    for name in names:
        tensor.parameters[name].bool_param = True
    # The name, the shape (packed) and the contents with its elements; each parameter with its key and its value.
    inside = 3 + len(elements) + 3 * len(names)
    nested: Any = {5: {4: {}, 5: {}}}
    assert count_parts(request.SerializeToString(), 10_000, nested) == len(elements) + 1 + inside


@given(st.binary(max_size=300))
def test_any_bytes_can_be_counted(data: bytes) -> None:
    assert 0 <= count_parts(data, 50) <= 51


def never(data: bytes) -> NoReturn:
    raise AssertionError("it was parsed")


async def ended(
    method: str, data: bytes, parse: Callable[[bytes], Any] = pb.ClassifyRequest.FromString
) -> tuple[grpc.StatusCode, str]:
    """Return how a call ends whose message is `data`; the handler behind must not be reached."""

    async def behaviour(request: Any, context: Any) -> NoReturn:
        raise AssertionError("it was handed on")

    handler: Any = grpc.unary_unary_rpc_method_handler(behaviour, request_deserializer=parse)

    async def continuation(details: Any) -> Any:
        return handler

    wrapped: Any = await Boundary("/secret").intercept_service(continuation, cast(Any, FakeDetails(method)))
    context = FakeContext()
    with pytest.raises(Aborted):
        await wrapped.unary_unary(wrapped.request_deserializer(data), context)
    assert context.ended is not None
    return context.ended[:2]


async def test_messages_that_are_none_or_too_much_are_refused_before_they_are_parsed() -> None:
    code, message = await ended(CLASSIFY, b"\x0a\xff")
    assert (code, message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the message is no request of tandem.v1.Inference/Classify",
    )
    code, message = await ended(CLASSIFY, parts(MAX_PARTS + 1), never)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "1,024 images are the limit" in message
    # A group, which the parser skips, must not hide what follows it.
    assert (await ended(CLASSIFY, b"\x7b\x7c" + parts(MAX_PARTS), never))[0] == grpc.StatusCode.INVALID_ARGUMENT
    code, message = await ended("/tandem.v1.Inference/Generate", bytes(MAX_TEXT_MESSAGE_BYTES + 1), never)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the limit is 2,097,152" in message
    streamed = pb.ClassifyStreamRequest(request=pb.ClassifyRequest.FromString(parts(MAX_PARTS + 1)))
    code, message = await ended("/tandem.v1.Inference/ClassifyStream", streamed.SerializeToString(), never)
    assert (code, "1,024 images are the limit" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    for method in (
        "Inference/Complete",
        "Inference/Score",
        "Models/LoadModel",
        "Models/SetAlias",
        "Models/WatchModels",
        "Models/StartShadow",
    ):
        code, _ = await ended(f"/tandem.v1.{method}", bytes(MAX_TEXT_MESSAGE_BYTES + 1), never)
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    for method in ("ModelInfer", "ModelStreamInfer"):
        infer = f"/inference.GRPCInferenceService/{method}"
        elements = oip.InferTensorContents(bytes_contents=[b""] * (MAX_PARTS + 1))
        request = oip.ModelInferRequest(inputs=[{"name": "image", "contents": elements}])
        code, message = await ended(infer, request.SerializeToString(), never)
        assert (code, "parts" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        request = oip.ModelInferRequest(inputs=[{"name": "x" * (MAX_TYPED_BYTES // 2)}] * 2)
        code, message = await ended(infer, request.SerializeToString(), never)
        assert (code, "send large tensors as raw" in message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    code, _ = await ended(
        "/inference.GRPCInferenceService/RepositoryModelLoad", bytes(MAX_TEXT_MESSAGE_BYTES + 1), never
    )
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_malformed_messages_of_a_stream_end_it() -> None:
    read: list[Any] = []

    async def echo(requests: Any, context: Any) -> Any:
        async for request in requests:
            read.append(request)
            yield request

    handler: Any = grpc.stream_stream_rpc_method_handler(echo, request_deserializer=pb.ClassifyRequest.FromString)

    async def continuation(details: Any) -> Any:
        return handler

    wrapped: Any = await Boundary("/secret").intercept_service(continuation, cast(Any, FakeDetails(CLASSIFY)))

    async def requests() -> Any:
        for data in (b"", b"\x0a\xff", b""):
            yield wrapped.request_deserializer(data)

    context = FakeContext()
    with pytest.raises(Aborted):
        async for _ in wrapped.stream_stream(requests(), context):
            pass
    assert read == [pb.ClassifyRequest()]
    assert context.ended is not None
    assert context.ended[0] == grpc.StatusCode.INVALID_ARGUMENT


class Failing:
    """An engine of which every part fails with a secret."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("secret of /srv/secret/home")


class FailingInside(Failing):
    """One that lets a stream begin."""

    devices = SimpleNamespace(least_busy=lambda _: SimpleNamespace(admit=lambda *_, **__: nullcontext()))


async def one(request: Any) -> Any:
    yield request


INFER = oip.ModelInferRequest(model_name="m")
# The first three of the Open Inference Protocol ask no model.
ASK_NOBODY = {"ServerLive", "ServerReady", "ServerMetadata"}
REQUESTS: dict[str, Any] = {
    "ModelReady": oip.ModelReadyRequest(name="m"),
    "ModelMetadata": oip.ModelMetadataRequest(name="m"),
    "ModelConfig": oip.ModelConfigRequest(name="m"),
    "ModelInfer": INFER,
    "ModelStatistics": oip.ModelStatisticsRequest(),
    "RepositoryIndex": oip.RepositoryIndexRequest(),
    "RepositoryModelLoad": oip.RepositoryModelLoadRequest(model_name="m"),
    "RepositoryModelUnload": oip.RepositoryModelUnloadRequest(model_name="m"),
    "Classify": pb.ClassifyRequest(model="m", images=[pb.Image(data=b"x")]),
    "Compare": pb.CompareRequest(model_a="m", model_b="n", images=[pb.Image(data=b"x")]),
    "CompareDataset": pb.CompareDatasetRequest(model_a="m", model_b="n", dataset="d"),
    "Generate": pb.GenerateRequest(model="m"),
    "ListModels": pb.ListModelsRequest(),
    "GetModel": pb.GetModelRequest(model="m"),
    "Complete": pb.GenerateRequest(model="m"),
    "Score": pb.ScoreRequest(model="m", texts=["a"]),
    "LoadModel": pb.LoadModelRequest(model="m"),
    "UnloadModel": pb.UnloadModelRequest(name="m"),
    "SetAlias": pb.SetAliasRequest(name="m", alias="production", version=1),
    "DeleteAlias": pb.DeleteAliasRequest(name="m", alias="production"),
    "WatchModels": pb.WatchModelsRequest(),
    "StartShadow": pb.StartShadowRequest(name="m", alias="production", candidate="m:2", share=0.5),
    "GetShadows": pb.GetShadowsRequest(),
    "StopShadow": pb.StopShadowRequest(name="m", alias="production"),
    "ClassifyStream": pb.ClassifyStreamRequest(request=pb.ClassifyRequest(model="m")),
}


def handlers(whole: bool = False, engine: Any = None) -> dict[str, Any]:
    """Return every method of our servicers that asks an engine, here one that fails, as gRPC gets them."""
    found: dict[str, Any] = {}

    class Server:
        def add_generic_rpc_handlers(self, _: Any) -> None:
            pass

        def add_registered_method_handlers(self, service: str, methods: dict[str, Any]) -> None:
            found.update({f"/{service}/{name}": handler for name, handler in methods.items()})

    engine = engine or Failing()
    status_of = Boundary("/srv/secret/home").status
    rpc.add_InferenceServicer_to_server(InferenceServicer(engine, status_of), Server())  # type: ignore[no-untyped-call]
    rpc.add_ModelsServicer_to_server(ModelsServicer(engine, status_of), Server())  # type: ignore[no-untyped-call]
    open_inference = OpenInferenceServicer(engine, lambda: True, status_of)
    add_open_inference(open_inference, Server())  # type: ignore[no-untyped-call]
    # Of a stream each request fails alone; see below.
    asked = {name for name in found if name.rpartition("/")[2] not in {*ASK_NOBODY, "ModelStreamInfer"}}
    return found if whole else {name: found[name] for name in asked}


@pytest.mark.parametrize("method", sorted(handlers()))
async def test_what_no_method_foresaw_is_opaque(method: str, caplog: pytest.LogCaptureFixture) -> None:
    async def continuation(details: Any) -> Any:
        return handlers()[method]

    wrapped: Any = await Boundary("/srv/secret/home").intercept_service(continuation, cast(Any, FakeDetails(method)))
    # A method without a request here must be given one.
    request, context = REQUESTS[method.rpartition("/")[2]], FakeContext()
    if wrapped.stream_stream:
        request = one(request)
    answers = wrapped.unary_stream or wrapped.stream_stream
    unary = wrapped.unary_unary or (lambda *arguments: anext(answers(*arguments)))
    with pytest.raises(Aborted):
        await unary(request, context)
    assert context.ended is not None
    code, message, metadata = context.ended
    assert (code, DETAILS_KEY in metadata) == (grpc.StatusCode.INTERNAL, False)
    words = message.split()
    assert words[:2] == ["internal", "error"]
    identifier = words[2].rstrip(";")
    assert len(identifier) == 8
    for inside in ("secret", "RuntimeError", "Traceback", os.sep + "srv", ".py"):
        assert inside not in message
    (record,) = [each for each in caplog.records if identifier in each.getMessage()]
    assert method in record.getMessage()
    assert "RuntimeError: secret of /srv/secret/home" in caplog.text


async def test_what_no_method_foresaw_is_opaque_within_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    stream = handlers(whole=True, engine=FailingInside())[
        "/inference.GRPCInferenceService/ModelStreamInfer"
    ].stream_stream
    (answer,) = [each async for each in stream(one(INFER), FakeContext())]
    assert answer.error_message.startswith("internal error ")
    assert "secret" not in answer.error_message
    assert "RuntimeError: secret of /srv/secret/home" in caplog.text
