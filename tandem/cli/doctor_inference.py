"""What `tandem doctor` asks of an inference server that answers: access, models, metrics."""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

from tandem.access import is_loopback
from tandem.cli.findings import Finding
from tandem.errors import ModelUnloaded, TandemError
from tandem.settings import Settings

if TYPE_CHECKING:
    from tandem.client import Client, ModelInfo

_TIMEOUT_S = 10.0
_METRICS_TIMEOUT_S = 3.0
_OURS = "tandem_inference_models_loaded"
_FAILURES = "tandem_inference_model_load_failures_total"


def inference_findings(settings: Settings, address: str) -> Iterator[Finding]:
    """Yield what there is to say of the server at `address`, which serves."""
    from tandem.client import Client
    from tandem.wire.channel import open_channel

    yield _encryption(settings, address)
    try:
        with (
            Client(address, _TIMEOUT_S, settings.client_access) as client,
            closing(open_channel(address, settings.client_access)) as channel,
        ):
            models = client.list_models()
            token = "with the token" if settings.client_access.token_file else "without a token"
            yield Finding("inference access", "ok", f"calls are let in {token}")
            yield from _models(client, partial(_serves, channel), models)
    except TandemError as error:
        yield Finding("inference access", "bad", "calls are refused", str(error))
    yield _metrics(settings.metrics_listen)


def _encryption(settings: Settings, address: str) -> Finding:
    if settings.client_access.is_encrypted:
        return Finding("inference TLS", "ok", "encrypted")
    if is_loopback(address.rpartition(":")[0].removeprefix("[").removesuffix("]")):
        return Finding("inference TLS", "ok", "not encrypted, on loopback")
    remedy = "TANDEM_TLS_CERT_FILE and TANDEM_TLS_KEY_FILE for the server, TANDEM_TLS_CA_FILE for its clients"
    return Finding("inference TLS", "off", f"calls to {address} can be read on the way", remedy)


def _serves(channel: Any, model: str) -> bool:
    """Return what the health service says of a model; True where it says nothing."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        answer = stub.Check(health_pb2.HealthCheckRequest(service=f"models/{model}"), timeout=_TIMEOUT_S)
    except grpc.RpcError:
        return True
    return bool(answer.status != health_pb2.HealthCheckResponse.NOT_SERVING)


def _models(client: "Client", serves: Callable[[str], bool], models: "list[ModelInfo]") -> Iterator[Finding]:
    problems = [problem for model in models if (problem := _problem(client, serves, model)) is not None]
    if not problems:
        loaded = sum(len(model.loaded) for model in models)
        yield Finding("inference models", "ok", f"{len(models)} in the registry, {loaded} versions in memory")
    yield from problems


def _problem(client: "Client", serves: Callable[[str], bool], model: "ModelInfo") -> Finding | None:
    """Return what keeps the newest version of a model from being served, None where nothing does."""
    # One that is only not in memory is left there: to load it might cost another its place.
    if model.latest in model.loaded or (not model.loaded and serves(model.name)):
        return None
    try:
        client.get_model(f"{model.name}:{model.latest}")
    except ModelUnloaded:
        return Finding(f"model {model.name}", "off", "unloaded by hand", "load it again, by hand too")
    except TandemError as error:
        older = f"version {max(model.loaded)} is served in its place" if model.loaded else "nothing is served"
        remedy = "restore its checkpoint, or train it anew; the log of the server has more"
        return Finding(f"model {model.name}", "bad", f"{error}; {older}", remedy)
    return None


def _metrics(listen: tuple[str, int] | None) -> Finding:
    if listen is None:
        return Finding("inference metrics", "off", "none", "for Prometheus: TANDEM_METRICS_LISTEN=127.0.0.1:9465")
    host, port = listen
    # 'tandem up' has the trainer answer at the port that is named, and inference at the next.
    for each in (port, port + 1):
        url = f"http://{_reachable(host)}:{each}/metrics"
        text = _read(url)
        if _OURS in text:
            detail = f"{url}, {_value(text, _OURS):.0f} versions in memory, {_value(text, _FAILURES):.0f} loads failed"
            return Finding("inference metrics", "ok", detail)
    remedy = "start the server with the TANDEM_METRICS_LISTEN that is set here"
    return Finding("inference metrics", "off", f"no answer of the server at {host}:{port}", remedy)


def _reachable(host: str) -> str:
    """Return a host to call where a service listens on `host`, which may stand for all."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - it is called, not listened on
    return f"[{host}]" if ":" in host else host


def _read(url: str) -> str:
    try:
        with urlopen(url, timeout=_METRICS_TIMEOUT_S) as answer:  # noqa: S310 - http alone, made up above
            body: Any = answer.read()
    except (URLError, OSError):
        return ""
    return str(body.decode("utf-8", "replace"))


def _value(text: str, name: str) -> float:
    lines = (line.split() for line in text.splitlines())
    return next((float(words[1]) for words in lines if len(words) == 2 and words[0] == name), float("nan"))
