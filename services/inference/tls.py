"""The server's certificate, read anew when its files change: a renewed one needs no restart."""

import logging
import threading
from pathlib import Path
from typing import Any

import grpc

from tandem.access import CERT_FILE, CLIENT_CA_FILE, KEY_FILE, ServerAccess
from tandem.errors import InvalidRequest
from tandem.pem import check_authority, check_pair, reason

log = logging.getLogger("tandem.inference.tls")

# Of each file what changes when it is written or replaced, None where it is not there.
Signature = tuple[tuple[int, int, int] | None, ...]


class Certificates:
    """Certificate, key and clients' authority of `access`, as gRPC asks for them at each handshake.

    Raises InvalidRequest if they are no such thing now. Later ones that are not, such as a pair of which one file is
    written and the other not yet, leave those before in use, and are logged once.
    """

    def __init__(self, access: ServerAccess) -> None:
        assert access.cert_file is not None
        assert access.key_file is not None
        self._cert_file, self._key_file, self._client_ca_file = access.cert_file, access.key_file, access.client_ca_file
        self._lock = threading.Lock()
        self._in_use = self._signature()
        self._refused: Signature | None = None
        self._first = self._read()
        if self._key_file.stat().st_mode & 0o077:
            log.warning("%s=%s can be read by others than its owner: chmod 600", KEY_FILE, self._key_file)

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a port is bound with."""
        return grpc.dynamic_ssl_server_credentials(
            self._first, self.changed, require_client_authentication=self._client_ca_file is not None
        )

    def changed(self) -> Any:
        """Return the configuration of files that changed, None where those in use go on. Called by gRPC's threads."""
        with self._lock:
            # Before the reading: what is written during it changes this once more.
            signature = self._signature()
            if signature == self._in_use:
                return None
            try:
                configuration = self._read()
            except (InvalidRequest, OSError) as error:
                self._refuse(signature, error)
                return None
            self._in_use, self._refused = signature, None
            log.info("the certificate of %s is in use from now on", self._cert_file)
            return configuration

    def _refuse(self, signature: Signature, error: Exception) -> None:
        if signature != self._refused:
            said = str(error) if isinstance(error, InvalidRequest) else reason(error)
            log.error("the certificate was changed, and the one before goes on being used: %s", said)
        self._refused = signature

    def _read(self) -> Any:
        """Return what the files hold; raise InvalidRequest if it does not belong together, or changes meanwhile."""
        before = self._contents()
        check_pair(CERT_FILE, self._cert_file, KEY_FILE, self._key_file)
        if self._client_ca_file:
            check_authority(CLIENT_CA_FILE, self._client_ca_file)
        # OpenSSL reads the files itself; what it saw must be what is served.
        if self._contents() != before:
            raise InvalidRequest(f"{CERT_FILE}={self._cert_file} is being written")
        certificate, key, authority = before
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)

    def _contents(self) -> tuple[bytes, bytes, bytes | None]:
        try:
            authority = self._client_ca_file.read_bytes() if self._client_ca_file else None
            return self._cert_file.read_bytes(), self._key_file.read_bytes(), authority
        except OSError as error:
            raise InvalidRequest(f"{error.filename} can't be read: {error.strerror}") from error

    def _signature(self) -> Signature:
        return tuple(signature_of(path) for path in (self._cert_file, self._key_file, self._client_ca_file) if path)


def signature_of(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when the file is written or replaced, None where it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
