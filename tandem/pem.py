"""Checks of PEM files when they are named, not in the middle of a handshake. `ssl` takes milliseconds to import."""

from pathlib import Path

from tandem.errors import InvalidRequest


def check_authority(name: str, path: Path) -> None:
    """Raise InvalidRequest, which begins with variable `name`, if `path` holds no certificate in PEM."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(f"{name}={path} is no certificate in PEM: {reason(error)}") from None


def check_pair(cert_name: str, cert_file: Path, key_name: str, key_file: Path) -> None:
    """Raise InvalidRequest, which names both variables, if the files are no certificate with its key, in PEM."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert_file, key_file, password=_no_passphrase)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise InvalidRequest(
            f"{cert_name}={cert_file} and {key_name}={key_file} are no certificate with its key in PEM: {reason(error)}"
        ) from None


def reason(error: Exception) -> str:
    """Return why a file was not read, or not understood, in a few words."""
    import ssl

    if isinstance(error, ssl.SSLError):
        return (error.reason or "nothing of the kind in it").replace("_", " ").lower()
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _no_passphrase() -> str:
    # Without it OpenSSL would ask a terminal.
    raise ValueError("the key is encrypted, and nobody is there to be asked")
