"""What is wrong with a broker, in one line with its remedy, from what redis-py or kombu raised."""

import socket
import ssl
from collections.abc import Iterator
from typing import TypeVar

from redis import exceptions

from tandem.errors import BrokerUnavailable
from tandem.jobs.broker import CA_FILE, CERT_FILE, KEY_FILE, PASSWORD_FILE, URL

Found = TypeVar("Found", bound=BaseException)

# X509_V_ERR_CERT_HAS_EXPIRED; X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH.
_EXPIRED, _OTHER_NAMES = 10, (62, 64)
_IS_IT_RUNNING = "is it running? 'tandem status' tells"


def broker_unavailable(error: BaseException, address: str) -> BrokerUnavailable:
    """Return the error to raise from `error`; `address` is shown, so it holds no password."""
    problem = _of_tls(error) or _of_the_server(error) or _of_the_way(error, address.startswith("rediss://"))
    return BrokerUnavailable(f"the broker at {address or URL} {problem}")


def _find(error: BaseException | None, kind: type[Found]) -> Found | None:
    """Return the first of `kind` among `error` and what led to it: redis-py and kombu wrap what the socket said."""
    return next((each for each in _chain(error) if isinstance(each, kind)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_tls(error: BaseException) -> str | None:
    if refused := _find(error, ssl.SSLCertVerificationError):
        if refused.verify_code in _OTHER_NAMES:
            return f"shows a certificate for another name: {URL} must name the host as its certificate does"
        if refused.verify_code == _EXPIRED:
            return "shows a certificate that has expired: renew it (or set this machine's clock)"
        return f"shows a certificate by none we trust ({refused.verify_message}): set {CA_FILE} to its authority's"
    if failed := _find(error, ssl.SSLError):
        reason = (failed.reason or str(failed)).lower()
        if "certificate_required" in reason or "handshake_failure" in reason:
            return f"wants a certificate of its clients: set {CERT_FILE} and {KEY_FILE}"
        if "unknown_ca" in reason or "certificate" in reason:
            return f"does not accept the certificate in {CERT_FILE} ({reason.replace('_', ' ')})"
        if "eof" in reason:
            # A server that misses our certificate may end before its reason has reached us.
            return (
                f"broke off the TLS handshake: if it wants a certificate of its clients, set {CERT_FILE} and {KEY_FILE}"
            )
        return f"does not speak TLS ({reason.replace('_', ' ')}): write redis://, or the port that does"
    return None


def _of_the_server(error: BaseException) -> str | None:
    """Return what an answer of the server means; None where it gave none."""
    if denied := _find(error, exceptions.AuthenticationError):
        return _of_authentication(str(denied))
    for kind, problem in _ANSWERS.items():
        if _find(error, kind):
            return problem
    answer = _find(error, exceptions.ResponseError)
    if answer is None:
        return None
    text = _line(answer)
    if "DB index" in text:
        return f"has no database of that number: write a lower one at the end of {URL}, such as /0"
    if "MISCONF" in text:
        return "can't save to its disk, and takes no writes: make room there; its log says more"
    return f"refused a command: {text}"


_ANSWERS: dict[type[exceptions.RedisError], str] = {
    exceptions.BusyLoadingError: "is loading its data: wait until it has",
    exceptions.ReadOnlyError: f"is a read-only replica: {URL} must name the primary",
    exceptions.OutOfMemoryError: "is out of memory: raise its maxmemory, or remove what else it holds",
    exceptions.NoPermissionError: "does not let this user do that: its ACL must allow ~* &* +@all",
    exceptions.InvalidResponse: "is no Redis, or speaks TLS: write rediss:// where it does",
}


def _of_authentication(answer: str) -> str:
    if "without any password" in answer:
        return f"has no password, but one is given: leave it out of {URL} and {PASSWORD_FILE}"
    if "invalid" in answer.lower():
        return f"does not accept the user and password of {URL} or {PASSWORD_FILE}"
    return f"wants a password: write it into a file, and set {PASSWORD_FILE} to that"


def _of_the_way(error: BaseException, has_tls: bool) -> str:
    if _find(error, socket.gaierror):
        return "does not answer: no host has that name; correct it, or ask the DNS"
    if _find(error, ConnectionRefusedError):
        return f"does not answer: nothing listens there; {_IS_IT_RUNNING}"
    if _find(error, FileNotFoundError):
        return f"does not answer: there is no such socket; {_IS_IT_RUNNING}"
    if _find(error, PermissionError):
        return "does not answer: this user may not open the socket"
    scheme = "if it speaks no TLS, write redis://" if has_tls else "if it speaks TLS, write rediss://"
    if _find(error, exceptions.TimeoutError) or _find(error, TimeoutError):
        return f"does not answer in time; {_IS_IT_RUNNING}; a firewall is silent too; {scheme}"
    if "closed by" in str(error).lower() or _find(error, ConnectionResetError) or _find(error, BrokenPipeError):
        return f"does not answer: it closed the connection; is it running? {scheme}"
    return f"does not answer: {_line(error)}; {_IS_IT_RUNNING}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
