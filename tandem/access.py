"""Who may call the inference server, and how: the files of its TLS and of its tokens, on both sides. Free of gRPC.

What the files hold is read where it is used: the trainer, which shares the environment, must not fail over them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from tandem.errors import InvalidRequest
from tandem.pem import check_authority, check_pair

CERT_FILE, KEY_FILE, CLIENT_CA_FILE = "TANDEM_TLS_CERT_FILE", "TANDEM_TLS_KEY_FILE", "TANDEM_TLS_CLIENT_CA_FILE"
TOKENS_FILE = "TANDEM_TOKENS_FILE"
CA_FILE = "TANDEM_TLS_CA_FILE"
CLIENT_CERT_FILE, CLIENT_KEY_FILE = "TANDEM_TLS_CLIENT_CERT_FILE", "TANDEM_TLS_CLIENT_KEY_FILE"
TOKEN_FILE, ALLOW_INSECURE_TOKEN = "TANDEM_TOKEN_FILE", "TANDEM_ALLOW_INSECURE_TOKEN"

# In place of a file: the public authorities that gRPC brings along.
PUBLIC = "public"


@dataclass(frozen=True)
class ServerAccess:
    """The server's side: its certificate and key, the authority that clients' certificates must be of, the tokens."""

    cert_file: Path | None = None
    key_file: Path | None = None
    client_ca_file: Path | None = None
    tokens_file: Path | None = None

    @property
    def is_encrypted(self) -> bool:
        """True if the server speaks TLS, and nothing else."""
        return self.cert_file is not None


@dataclass(frozen=True)
class ClientAccess:
    """A client's side: the authority to trust (a PEM file, or Path("public")), a certificate to show, a token."""

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    token_file: Path | None = None
    allow_insecure_token: bool = False

    @property
    def is_encrypted(self) -> bool:
        """True if the client speaks TLS, and nothing else."""
        return self.ca_file is not None


OPEN = ClientAccess()


@dataclass(frozen=True)
class Credentials:
    """What the files of a ClientAccess hold; `root_certificates` None with `is_encrypted` are the public ones."""

    is_encrypted: bool = False
    root_certificates: bytes | None = None
    certificate_chain: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)


def server_access(environment: Mapping[str, str]) -> ServerAccess:
    """Return what the variables name; raise InvalidRequest where they contradict one another."""
    names = (CERT_FILE, KEY_FILE, CLIENT_CA_FILE, TOKENS_FILE)
    access = ServerAccess(*(_path(environment, name) for name in names))
    _both_or_neither(access.cert_file, CERT_FILE, access.key_file, KEY_FILE)
    if access.client_ca_file and not access.cert_file:
        raise InvalidRequest(f"{CLIENT_CA_FILE} is set, but the server has no certificate: set {CERT_FILE} too")
    return access


def client_access(environment: Mapping[str, str]) -> ClientAccess:
    """Return what the variables name; raise InvalidRequest where they contradict one another."""
    access = ClientAccess(
        ca_file=_path(environment, CA_FILE),
        cert_file=_path(environment, CLIENT_CERT_FILE),
        key_file=_path(environment, CLIENT_KEY_FILE),
        token_file=_path(environment, TOKEN_FILE),
        allow_insecure_token=environment.get(ALLOW_INSECURE_TOKEN) == "1",
    )
    _both_or_neither(access.cert_file, CLIENT_CERT_FILE, access.key_file, CLIENT_KEY_FILE)
    if access.cert_file and not access.ca_file:
        raise InvalidRequest(
            f"{CLIENT_CERT_FILE} is set, but calls are not encrypted: set {CA_FILE} to the authority of the server's "
            f"certificate, or to {PUBLIC}"
        )
    return access


def read_credentials(access: ClientAccess, address: str) -> Credentials:
    """Return what the files hold for calls to `address`.

    Raises InvalidRequest for a file that can't be read or does not hold what it should, and for a token that would
    cross a network in the clear.
    """
    token = None if access.token_file is None else _read_token(access.token_file)
    if token and not access.is_encrypted and not access.allow_insecure_token and not _stays_here(address):
        raise InvalidRequest(
            f"{TOKEN_FILE} is set, but calls to {address} are not encrypted: set {CA_FILE}, or "
            f"{ALLOW_INSECURE_TOKEN}=1 where the network itself is closed"
        )
    if access.ca_file is None:
        return Credentials(token=token)
    roots = chain = key = None
    if access.ca_file != Path(PUBLIC):
        check_authority(CA_FILE, access.ca_file)
        roots = access.ca_file.read_bytes()
    if access.cert_file and access.key_file:
        check_pair(CLIENT_CERT_FILE, access.cert_file, CLIENT_KEY_FILE, access.key_file)
        chain, key = access.cert_file.read_bytes(), access.key_file.read_bytes()
    return Credentials(True, roots, chain, key, token)


def is_loopback(host: str) -> bool:
    """Return whether `host` can be reached from this machine alone."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _stays_here(address: str) -> bool:
    host = address.rpartition(":")[0]
    return address.startswith("unix:") or is_loopback(host.removeprefix("[").removesuffix("]"))


def _path(environment: Mapping[str, str], name: str) -> Path | None:
    text = environment.get(name)
    return Path(text) if text else None


def _both_or_neither(cert_file: Path | None, cert_name: str, key_file: Path | None, key_name: str) -> None:
    if (cert_file is None) != (key_file is None):
        raise InvalidRequest(f"{cert_name} and {key_name} go together: set both, or neither")


def _read_token(path: Path) -> str:
    try:
        token = path.read_text("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    except OSError as error:
        raise InvalidRequest(f"{TOKEN_FILE}={path} can't be read: {error.strerror}") from None
    # What a header can't carry would fail in the middle of a call, with the token in the message.
    if not token or not all("!" <= each <= "~" for each in token):
        raise InvalidRequest(f"{TOKEN_FILE}={path} must hold the token alone, on one line")
    return token
