"""Where the broker is and how to get in: read once, handed to redis-py and to Celery alike. Free of both.

    redis://[USER][:PASSWORD@]HOST[:PORT][/DB]         TCP
    rediss://…                                         TCP with TLS; certificate and host name are always checked
    unix://[[USER]:PASSWORD@]/PATH[?db=DB]             a Unix socket
    redis+socket://…/PATH[?virtual_host=DB]            the same, as Celery writes it

Signs such as @ : / % # in a user or a password are percent-encoded. A password never shows in `str` or `repr`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tandem.errors import InvalidRequest
from tandem.pem import check_authority, check_pair, reason

URL, PASSWORD_FILE = "TANDEM_REDIS_URL", "TANDEM_REDIS_PASSWORD_FILE"
CA_FILE, CERT_FILE, KEY_FILE = "TANDEM_REDIS_CA_FILE", "TANDEM_REDIS_CERT_FILE", "TANDEM_REDIS_KEY_FILE"
# What applies to one broker only: where another is used, all are set anew.
VARIABLES = (URL, PASSWORD_FILE, CA_FILE, CERT_FILE, KEY_FILE)

_NETWORK, _SOCKET = ("redis", "rediss"), ("unix", "redis+socket")
_DEFAULT_PORT = 6379
_SHAPE = "write redis://[USER][:PASSWORD@]HOST[:PORT][/DB], with signs such as @ : / % # percent-encoded (%40 is @)"


@dataclass(frozen=True)
class Tls:
    """Files in PEM: the authority to trust (None: those of the system), and the certificate to show (None: none)."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


@dataclass(frozen=True)
class Broker:
    """A Redis: at `host` and `port`, or at the Unix socket `path`; database `db`; with TLS where `tls` is there."""

    host: str = ""
    port: int = _DEFAULT_PORT
    path: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    @classmethod
    def of(cls, address: "Broker | str") -> "Broker":
        """Return `address`, parsed where it is a URL; raise InvalidRequest."""
        return address if isinstance(address, Broker) else parse_url(address)

    def __str__(self) -> str:
        return self._url("")

    def _url(self, credentials: str) -> str:
        if self.path:
            return f"redis+socket://{credentials}{quote(self.path)}?virtual_host={self.db}"
        scheme = "redis" if self.tls is None else "rediss"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{credentials}{host}:{self.port}/{self.db}"

    def client_options(self) -> dict[str, Any]:
        """Return what redis-py's clients take, blocking and asyncio."""
        options: dict[str, Any] = {"db": self.db, "username": self.username, "password": self.password}
        if self.path:
            return {**options, "unix_socket_path": self.path}
        tls = {"ssl": True, **self._tls_options()} if self.tls else {}
        return {**options, "host": self.host, "port": self.port, **tls}

    def celery_options(self) -> dict[str, Any]:
        """Return Celery's settings `broker_url` (with the password: not to be shown) and `broker_use_ssl`."""
        user, password = quote(self.username or "", safe=""), quote(self.password or "", safe="")
        credentials = f"{user}:{password}@" if user or password else ""
        return {"broker_url": self._url(credentials), "broker_use_ssl": self._tls_options() if self.tls else False}

    def _tls_options(self) -> dict[str, Any]:
        assert self.tls is not None
        files = {
            "ssl_ca_certs": self.tls.ca_file,
            "ssl_certfile": self.tls.cert_file,
            "ssl_keyfile": self.tls.key_file,
        }
        given = {name: str(path) for name, path in files.items() if path}
        # Said although redis-py has it so since version 6: before, host names went unchecked.
        return {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **given}


def parse_url(url: str) -> Broker:
    """Return the broker of `url`; raise InvalidRequest, which does not repeat it: there may be a password in it."""
    scheme, _, rest = url.partition("://")
    if scheme not in (*_NETWORK, *_SOCKET):
        raise InvalidRequest(f"{URL} begins with none of redis://, rediss://, unix:// and redis+socket://")
    try:
        parts = urlsplit(f"//{rest}")
    except ValueError:
        # Its message may repeat the password.
        raise _malformed("it is malformed") from None
    if parts.fragment:
        raise _malformed("it has a '#'")
    userinfo, _, host_and_port = parts.netloc.rpartition("@")
    username, _, password = (unquote(part) for part in userinfo.partition(":"))
    options = _options(parts.query)
    broker = Broker(username=username or None, password=password or None, tls=Tls() if scheme == "rediss" else None)
    if scheme in _SOCKET:
        if host_and_port or not parts.path.strip("/"):
            raise InvalidRequest(f"{URL} names no socket: write {scheme}:///PATH, with three slashes")
        return replace(broker, path=unquote(parts.path), db=_database(options))
    host, port = _host_and_port(host_and_port)
    return replace(broker, host=host, port=port, db=_database(options, parts.path.strip("/")))


def _malformed(problem: str) -> InvalidRequest:
    return InvalidRequest(f"{URL} is no Redis address: {problem}; {_SHAPE}")


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon:
        host, port = text, str(_DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) <= 65_535:
        raise _malformed("its port is no number from 1 to 65535")
    return unquote(host).removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in options.items():
        if name == "ssl_cert_reqs" and value.lower() not in ("required", "cert_required"):
            raise InvalidRequest(f"{URL}: certificates are always checked; instead of {name} set {CA_FILE}")
        if name not in ("db", "virtual_host", "ssl_cert_reqs"):
            # The name is not repeated: it may be the rest of a password with a '?' in it.
            raise _malformed("its only options are db and virtual_host")
    return options


def _database(options: Mapping[str, str], path: str = "") -> int:
    text = options.get("db") or options.get("virtual_host") or path or "0"
    if not text.isdecimal():
        raise _malformed("its database is no number")
    return int(text)


def read_broker(environment: Mapping[str, str]) -> Broker | None:
    """Return the broker that the variables name, None where they name none.

    Raises InvalidRequest for an address that is none, for a file that can't be read or does not hold what it should,
    and for variables that contradict one another.
    """
    url = environment.get(URL) or environment.get("REDIS_URL")
    if not url:
        return None
    broker = parse_url(url)
    if path := environment.get(PASSWORD_FILE):
        if broker.password is not None:
            raise InvalidRequest(f"{URL} has a password, and {PASSWORD_FILE} is set: keep one of them")
        broker = replace(broker, password=_read_password(Path(path)))
    given = {name: Path(path) for name in (CA_FILE, CERT_FILE, KEY_FILE) if (path := environment.get(name))}
    if not given:
        return broker
    if broker.tls is None:
        raise InvalidRequest(f"{next(iter(given))} is set, but {broker} is not encrypted: write rediss://")
    tls = Tls(given.get(CA_FILE), given.get(CERT_FILE), given.get(KEY_FILE))
    _check_files(tls)
    return replace(broker, tls=tls)


def _read_password(path: Path) -> str:
    try:
        password = path.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{PASSWORD_FILE}={path} can't be read: {reason(error)}") from None
    if not password or "\n" in password:
        raise InvalidRequest(f"{PASSWORD_FILE}={path} must hold the password alone, on one line")
    return password


def _check_files(tls: Tls) -> None:
    """Raise InvalidRequest for what would otherwise fail in the middle of a handshake, or ask a terminal."""
    if (tls.cert_file is None) != (tls.key_file is None):
        raise InvalidRequest(f"{CERT_FILE} and {KEY_FILE} go together: set both, or neither")
    if tls.ca_file:
        check_authority(CA_FILE, tls.ca_file)
    if tls.cert_file and tls.key_file:
        check_pair(CERT_FILE, tls.cert_file, KEY_FILE, tls.key_file)
