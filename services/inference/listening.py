"""Where the server listens and what it lets happen on a connection, before any call."""

import logging
import socket

import grpc

from services.inference.tls import Certificates
from tandem.access import CERT_FILE, CLIENT_CA_FILE, KEY_FILE, TOKENS_FILE, ServerAccess, is_loopback
from tandem.errors import Conflict, InvalidRequest
from tandem.wire.limits import CHANNEL_OPTIONS, MAX_CONNECTION_CALLS, MAX_HEADER_BYTES

ALLOW_INSECURE_LISTEN = "TANDEM_ALLOW_INSECURE_LISTEN"
MIN_PING_INTERVAL_S = 10
MAX_PING_STRIKES = 2

SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    # Without this a second server on the same port would start, and the kernel would share the callers out.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", MAX_CONNECTION_CALLS),
    # A client may ask often whether its connection still stands, idle or not; who asks more often is sent away.
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_S * 1000),
    ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
    # A client that is gone without a word is noticed within 80 s, and its calls are given up; gRPC's default is 2 h.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The default, said because it is what bounds the headers of a call: bytes.
    ("grpc.absolute_max_metadata_size", MAX_HEADER_BYTES),
)

log = logging.getLogger("tandem.inference")


def quiet_about_callers_who_leave() -> None:
    """Keep gRPC from logging a traceback where a caller leaves while an answer is being written: that is no error."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_of_interest)


def _is_of_interest(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")


def check_loopback(host: str, allow_insecure: bool) -> None:
    """Raise InvalidRequest if `host` can be reached from other machines, unless that is allowed."""
    if not is_loopback(host) and not allow_insecure:
        raise InvalidRequest(
            f"{host} is not a loopback address, and calls are not encrypted: listen on 127.0.0.1, set {CERT_FILE} and "
            f"{KEY_FILE}, or set {ALLOW_INSECURE_LISTEN}=1 where the network itself is closed"
        )


def warn_of_open_doors(host: str, access: ServerAccess) -> None:
    """Log who may do what from other machines, where that is more than it need be."""
    if is_loopback(host):
        return
    if not access.tokens_file:
        who = f"anyone with a certificate of {CLIENT_CA_FILE}" if access.client_ca_file else "anyone who reaches it"
        log.warning("listening on %s without %s: %s may make every call", host, TOKENS_FILE, who)
    elif not access.is_encrypted:
        log.warning("listening on %s without TLS: tokens can be read on the way", host)


def check_free(host: str, port: int) -> int:
    """Return `port`, or a free one for 0; raise Conflict if it can't be bound, with the reason."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise _not_bound(host, port, error.strerror or str(error)) from error
    return port


def bind(server: grpc.aio.Server, host: str, port: int, certificates: Certificates | None) -> str:
    """Return the HOST:PORT that `server` was bound to; raise Conflict."""
    bracketed = f"[{host}]" if ":" in host else host
    try:
        if certificates is None:
            bound = server.add_insecure_port(f"{bracketed}:{port}")
        else:
            bound = server.add_secure_port(f"{bracketed}:{port}", certificates.credentials())
    except RuntimeError as error:
        raise _not_bound(host, port, "gRPC can't bind it") from error
    return f"{bracketed}:{bound}"


def _not_bound(host: str, port: int, reason: str) -> Conflict:
    return Conflict(f"can't listen on {host}:{port}: {reason}; choose another with --listen HOST:PORT (port 0: any)")
