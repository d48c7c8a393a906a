"""Every TANDEM_* variable, read once into one frozen object.

| variable | meaning | default |
|---|---|---|
| TANDEM_HOME | the shared volume | ~/.tandem |
| TANDEM_CHECKPOINT_STORE | object store that hosts share checkpoints and models by: s3://bucket/prefix | none |
| TANDEM_CHECKPOINT_CACHE | what an inference server keeps of it on its volume: 512MiB, 20GiB | 20GiB |
| TANDEM_REDIS_URL (or REDIS_URL) | broker and job records: redis://, rediss://, unix:// | the broker of `tandem up` |
| TANDEM_REDIS_PASSWORD_FILE | file with the broker's password, so that it stands in no environment | none |
| TANDEM_REDIS_CA_FILE | PEM file of the authority that signed the broker's certificate | those of the system |
| TANDEM_REDIS_CERT_FILE, TANDEM_REDIS_KEY_FILE | PEM files of our own certificate, where the broker wants one | none |
| TANDEM_INFERENCE_ADDRESS | host:port that clients call | the server of `tandem up` |
| TANDEM_LISTEN | host:port that the inference server listens on | 127.0.0.1:8500 |
| TANDEM_TLS_CERT_FILE, TANDEM_TLS_KEY_FILE | PEM files of the server's certificate, which turn TLS on | none |
| TANDEM_TLS_CLIENT_CA_FILE | PEM file of the authority that the server wants clients' certificates of | none |
| TANDEM_TOKENS_FILE | file with the tokens that the server lets in, and their scopes | none: whoever connects |
| TANDEM_TLS_CA_FILE | for clients: PEM file of the server's authority, or `public`; turns TLS on | none: no TLS |
| TANDEM_TLS_CLIENT_CERT_FILE, TANDEM_TLS_CLIENT_KEY_FILE | PEM files of the certificate that clients show | none |
| TANDEM_TOKEN_FILE | file with the token that clients send; only encrypted or to loopback | none |
| TANDEM_ALLOW_INSECURE_TOKEN | 1: the token may go out in the clear, where the network itself is closed | 0 |
| TANDEM_QUEUES | queues that a worker takes runs from | default,cpu and, with a GPU, gpu |
| TANDEM_SLOTS | runs that a worker carries at a time, in equal shares of its machine | one for each GPU, or 1 |
| TANDEM_PRELOAD | 1: a process waits with everything imported, for a quick start | 1 |
| TANDEM_DEVICE | of serving (a run names its own): auto, cpu, cuda, cuda:1; or several: cuda:0,cuda:1 | auto |
| TANDEM_MODEL_MEMORY | what the server's models may take on a device: 512MiB, 2GiB | half the RAM, 70 % of a GPU |
| TANDEM_ENGINE | what runs classifiers: auto (the fastest that agrees with eager), eager, compiled, openvino | auto |
| TANDEM_PRECISION | in which Classify computes: float32, bfloat16 where the device has it, or int8 on a CPU | float32 |
| TANDEM_LEASE_S | seconds for which a worker holds a run without renewing | 5 |
| TANDEM_STOP_GRACE_S | seconds a training process gets to save before it is killed | 60 |
| TANDEM_DRAIN_DELAY_S | seconds for which a stopping server still takes calls | 0 on loopback, else 5 |
| TANDEM_DRAIN_GRACE_S | seconds that calls under way get then | 5 |
| TANDEM_SLOW_REQUEST_MS | milliseconds from which on a call is slow, and logged; 0: none is | 1000 |
| TANDEM_METRICS_LISTEN | host:port on which a service answers Prometheus at /metrics | none: no metrics |
| TANDEM_HEARTBEAT_FILE | file that a living worker touches | tandem-worker.heartbeat in $TMPDIR or /tmp |
| TANDEM_LOG_LEVEL | DEBUG, INFO, WARNING, ERROR | INFO |
| TANDEM_LOG_FORMAT | of the services' logs: text, or json for one document a line | text |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from tandem.access import ClientAccess, ServerAccess, client_access, server_access
from tandem.errors import InvalidRequest
from tandem.jobs.broker import Broker, read_broker
from tandem.sizes import parse_size

# The queues there are: that of any worker, and those of its device.
QUEUES = ("default", "cpu", "gpu")
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_LOG_FORMATS = ("text", "json")
# What fsspec opens; `file` and `memory` are for trying things out.
STORE_PROTOCOLS = ("s3", "gs", "abfs", "file", "memory")
# The first of each is the default.
_ENGINES = ("auto", "eager", "compiled", "openvino")
_PRECISIONS: tuple[Literal["float32", "bfloat16", "int8"], ...] = ("float32", "bfloat16", "int8")

Default = TypeVar("Default", float, None)
Choice = TypeVar("Choice", bound=str)


@dataclass(frozen=True)
class Settings:
    """What the environment says; see the module's table."""

    home: Path
    checkpoint_store: str | None
    checkpoint_cache: int
    broker: Broker | None
    inference_address: str | None
    listen: str
    server_access: ServerAccess
    client_access: ClientAccess
    queues: tuple[str, ...] | None
    num_slots: int | None
    preload: bool
    device: str
    # Bytes; None for the default, which hangs on the device.
    model_memory: int | None
    engine: str
    precision: Literal["float32", "bfloat16", "int8"]
    lease_s: float
    stop_grace_s: float
    drain_delay_s: float | None
    drain_grace_s: float
    slow_request_ms: float
    heartbeat_file: Path
    metrics_listen: tuple[str, int] | None
    log_level: str
    log_format: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the variables and the files they name; raise InvalidRequest for a value that makes no sense."""
        get = environment.get
        return cls(
            home=Path(get("TANDEM_HOME") or "~/.tandem").expanduser().absolute(),
            checkpoint_store=_store(get("TANDEM_CHECKPOINT_STORE") or ""),
            checkpoint_cache=_size(environment, "TANDEM_CHECKPOINT_CACHE") or 20 * 2**30,
            broker=read_broker(environment),
            inference_address=get("TANDEM_INFERENCE_ADDRESS") or None,
            listen=get("TANDEM_LISTEN") or "127.0.0.1:8500",
            server_access=server_access(environment),
            client_access=client_access(environment),
            queues=_queues(get("TANDEM_QUEUES") or ""),
            num_slots=_count(environment, "TANDEM_SLOTS"),
            preload=_switch(environment, "TANDEM_PRELOAD", default=True),
            device=get("TANDEM_DEVICE") or "auto",
            model_memory=_size(environment, "TANDEM_MODEL_MEMORY"),
            engine=_one_of(environment, "TANDEM_ENGINE", _ENGINES),
            precision=_one_of(environment, "TANDEM_PRECISION", _PRECISIONS),
            lease_s=_seconds(environment, "TANDEM_LEASE_S", 5.0),
            stop_grace_s=_seconds(environment, "TANDEM_STOP_GRACE_S", 60.0),
            drain_delay_s=_not_negative(environment, "TANDEM_DRAIN_DELAY_S", "seconds", None),
            drain_grace_s=_seconds(environment, "TANDEM_DRAIN_GRACE_S", 5.0),
            slow_request_ms=_not_negative(environment, "TANDEM_SLOW_REQUEST_MS", "milliseconds", 1000.0),
            heartbeat_file=heartbeat_file(environment),
            metrics_listen=_metrics_listen(get("TANDEM_METRICS_LISTEN") or ""),
            log_level=_log_level(get("TANDEM_LOG_LEVEL") or "INFO"),
            log_format=_log_format(get("TANDEM_LOG_FORMAT") or "text"),
        )


def heartbeat_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Return TANDEM_HEARTBEAT_FILE; alone, since a check of health must not fail over another variable."""
    # Where tempfile would look too, whose import takes every command 3 ms.
    default = Path(environment.get("TMPDIR") or "/tmp", "tandem-worker.heartbeat")  # noqa: S108 - opened with care
    return Path(environment.get("TANDEM_HEARTBEAT_FILE") or default).absolute()


def parse_listen(listen_address: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT` (an IPv6 host in brackets); raise InvalidRequest."""
    host, colon, port = listen_address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"can't listen on {listen_address!r}: write HOST:PORT, such as 127.0.0.1:8500")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _metrics_listen(text: str) -> tuple[str, int] | None:
    try:
        return parse_listen(text) if text else None
    except InvalidRequest as error:
        raise InvalidRequest(f"TANDEM_METRICS_LISTEN: {error}") from error


def _queues(text: str) -> tuple[str, ...] | None:
    if not text:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if unknown := sorted(set(names) - set(QUEUES)):
        raise InvalidRequest(
            f"TANDEM_QUEUES={text!r}: no queue is called {unknown[0]!r}; there are {', '.join(QUEUES)}"
        )
    return names


def _count(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InvalidRequest(f"{name}={text!r} is not a whole number above 0", field=name)
    return int(text)


def _size(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        size = parse_size(text)
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}", field=name) from error
    if not size:
        raise InvalidRequest(f"{name}={text!r} leaves no room for a model", field=name)
    return size


def _store(text: str) -> str | None:
    if not text:
        return None
    protocol, separator, path = text.partition("://")
    if protocol not in STORE_PROTOCOLS or not separator or not path.strip("/") or "@" in path:
        raise InvalidRequest(
            f"TANDEM_CHECKPOINT_STORE={text!r} is no object store: write s3://BUCKET/PREFIX; credentials stand in the "
            "provider's own variables and files",
            field="TANDEM_CHECKPOINT_STORE",
        )
    return text.rstrip("/")


def _switch(environment: Mapping[str, str], name: str, default: bool) -> bool:
    text = environment.get(name) or str(int(default))
    if text not in ("0", "1"):
        raise InvalidRequest(f"{name}={text!r} is neither 0 nor 1", field=name)
    return text == "1"


def _one_of(environment: Mapping[str, str], name: str, values: tuple[Choice, ...]) -> Choice:
    text = (environment.get(name) or values[0]).lower()
    for value in values:
        if text == value:
            return value
    raise InvalidRequest(f"{name}={text!r} is none of {', '.join(values)}", field=name)


def _log_level(text: str) -> str:
    if text.upper() not in _LOG_LEVELS:
        raise InvalidRequest(f"TANDEM_LOG_LEVEL={text!r} is none of {', '.join(_LOG_LEVELS)}")
    return text.upper()


def _log_format(text: str) -> str:
    if text.lower() not in _LOG_FORMATS:
        raise InvalidRequest(f"TANDEM_LOG_FORMAT={text!r} is none of {', '.join(_LOG_FORMATS)}")
    return text.lower()


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise InvalidRequest(f"{name}={text!r} is not a number of seconds above 0", field=name)
    return value


def _not_negative(environment: Mapping[str, str], name: str, unit: str, default: Default) -> float | Default:
    text = environment.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InvalidRequest(f"{name}={text!r} is not a number of {unit}, 0 or above", field=name)
    return value
