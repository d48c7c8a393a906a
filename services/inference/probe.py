"""Whether the server that shares this environment serves: `python -m services.inference.probe`, for health checks.

It asks `grpc.health.v1` on loopback, at the port of TANDEM_LISTEN; that needs no token. Where the server speaks TLS,
its own certificate is trusted, under a name of its own; where it wants certificates of clients, those that
TANDEM_TLS_CLIENT_CERT_FILE and TANDEM_TLS_CLIENT_KEY_FILE name are shown.
"""

import ssl
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.access import CERT_FILE
from tandem.errors import InvalidRequest, ServerUnavailable, TandemError
from tandem.pem import check_authority
from tandem.settings import Settings, parse_listen

_TIMEOUT_S = 5.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - they are called, not listened on


def check(settings: Settings) -> None:
    """Return if the server serves; raise ServerUnavailable saying what is wrong, InvalidRequest for a bad variable."""
    address = probed_address(settings.listen)
    try:
        with closing(_channel(settings, address)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S).status
    except grpc.RpcError as error:
        # grpcio's types don't say that a call that failed is a call too.
        raise ServerUnavailable(f"no answer at {address}: {cast(Any, error).details()}") from error
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise ServerUnavailable(f"the server at {address} is up and does not serve (yet, or any more)")


def probed_address(listen: str) -> str:
    """Return the address to call where the server listens on `listen`."""
    host, port = parse_listen(listen)
    host = _EVERYWHERE.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _channel(settings: Settings, address: str) -> grpc.Channel:
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    certificate = settings.server_access.cert_file
    if certificate is None:
        return grpc.insecure_channel(address, options=options)
    check_authority(CERT_FILE, certificate)
    access = settings.client_access
    shown = (access.key_file, access.cert_file) if settings.server_access.client_ca_file else (None, None)
    key, chain = (path.read_bytes() if path else None for path in shown)
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes(), key, chain)
    options.append(("grpc.ssl_target_name_override", _name_in(certificate)))
    return grpc.secure_channel(address, credentials, options=options)


def _name_in(certificate: Path) -> str:
    """Return a name that the certificate is for; raise InvalidRequest where there is none."""
    # What CPython's own tests read certificates with: `ssl` shows only those of peers, and of authorities.
    facts: dict[str, Any] = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
    names = [value for kind, value in facts.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    if not names:
        raise InvalidRequest(f"{CERT_FILE}={certificate} names no host: make it with subjectAltName")
    return str(names[0]).replace("*", "any")


def main() -> None:
    """Exit 0 if the server serves, 1 with one line if not."""
    try:
        check(Settings.from_environment())
    except (TandemError, OSError) as error:
        sys.exit(f"tandem inference: {error}")


if __name__ == "__main__":
    main()
