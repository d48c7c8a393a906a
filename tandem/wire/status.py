"""Errors on the wire: one table from TandemError to gRPC status and back, with the details of google.rpc.

The details carry the class of the error (ErrorInfo), the field of a wrong argument (BadRequest) and when to try again
(RetryInfo), so that a client raises an error of the class, the field and the retry time that the server's had.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from tandem import errors
from tandem.errors import TandemError
from tandem.wire.handshakes import tls_problem

# Characters of a message; told twice where a field is wrong, and up to four bytes each.
MAX_TEXT = 1000
DOMAIN = "tandem"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"

# The first row that fits counts.
_CODES: tuple[tuple[type[TandemError], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.Conflict, grpc.StatusCode.ABORTED),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.AccessDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.CheckpointCorrupt, grpc.StatusCode.DATA_LOSS),
    (errors.LimitExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.VolumeReadOnly, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.BadSource, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.TrainingFailed, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ModelTooLarge, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ExportFailed, grpc.StatusCode.FAILED_PRECONDITION),
)
# For a status that carries no ErrorInfo of ours: gRPC's own limits, deadlines and lost connections.
_ERRORS: dict[grpc.StatusCode, type[TandemError]] = {
    **{code: kind for kind, code in reversed(_CODES)},
    grpc.StatusCode.FAILED_PRECONDITION: errors.Conflict,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAVAILABLE: errors.ServerUnavailable,
}
Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True)
class WireStatus:
    """What an error becomes: a code, one line, and the trailing metadata."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: Metadata


def status_code(error: TandemError) -> grpc.StatusCode:
    """Return the status code of `error`."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)


def to_status(error: TandemError, message: str | None = None) -> WireStatus:
    """Return the status of `error`; `message` replaces its own text."""
    code, text = status_code(error), _short(message if message is not None else str(error))
    rich = status_pb2.Status(code=_number(code), message=text)
    trailing: list[tuple[str, str | bytes]] = []
    rich.details.add().Pack(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN))
    if isinstance(error, errors.InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=text)
        rich.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.QueueFull):
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        rich.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        # gRPC's own retries follow this trailer alone.
        trailing.append((PUSHBACK_KEY, str(int(error.retry_after_s * 1000))))
    trailing.append((DETAILS_KEY, rich.SerializeToString()))
    return WireStatus(code, text, tuple(trailing))


def _short(text: str) -> str:
    """Return `text`, or its beginning: a status travels in headers, of which there may be 16 KiB."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def to_rich(status: WireStatus) -> status_pb2.Status:
    """Return `status` as a message, for a place within a stream."""
    rich = _rich_status(status.trailing_metadata)
    return status_pb2.Status(code=_number(status.code), message=status.message) if rich is None else rich


def from_rich(rich: status_pb2.Status) -> TandemError:
    """Return the TandemError that the message stands for."""
    code = next((code for code in grpc.StatusCode if _number(code) == rich.code), grpc.StatusCode.UNKNOWN)
    return _rebuild(rich, code, " ".join(rich.message.split()))


def from_rpc_error(error: Any, address: str, received: str = "", is_encrypted: bool = False) -> TandemError:
    """Return the TandemError that an RpcError (blocking or asyncio) stands for; `address` is the server's.

    `received` is what had been answered before, such as "12 words"; empty for nothing. `is_encrypted` says whether the
    client speaks TLS.
    """
    code = error.code()
    message = " ".join((error.details() or "").split())
    rich = _rich_status(error.trailing_metadata() or ())
    if received and rich is None and code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return errors.ServerUnavailable(f"the connection to {address} was lost after {received}")
    if code == grpc.StatusCode.CANCELLED and rich is None:
        # Who cancels a call of his own gets no RpcError of it: the server has stopped before it began with this one.
        return errors.ServerUnavailable(f"the inference server at {address} is stopping; try again")
    if code == grpc.StatusCode.UNAVAILABLE and rich is None:
        if problem := tls_problem(message, address, is_encrypted):
            return errors.ServerUnavailable(problem)
        return errors.ServerUnavailable(
            f"no inference server answers at {address}: start the system with 'tandem up --detach', "
            "or set TANDEM_INFERENCE_ADDRESS"
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED and rich is None:
        return errors.DeadlineExceeded(f"the inference server at {address} did not answer within the call's deadline")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return errors.Conflict(f"the server at {address} is no inference server of this version: {message}")
    return _rebuild(rich, code, message)


def _rebuild(rich: status_pb2.Status | None, code: grpc.StatusCode, message: str) -> TandemError:
    kind = getattr(errors, _reason(rich), None)
    if not (isinstance(kind, type) and issubclass(kind, TandemError)):
        kind = _ERRORS.get(code)
    if kind is None:
        return TandemError(f"the inference server failed: {message or code.name}")
    if issubclass(kind, errors.InvalidRequest):
        return kind(message, field=_field(rich))
    if issubclass(kind, errors.QueueFull):
        return kind(message, retry_after_s=_retry_after_s(rich))
    return kind(message)


def _rich_status(metadata: Iterable[Any]) -> status_pb2.Status | None:
    for key, value in metadata:
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _reason(rich: status_pb2.Status | None) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in rich.details if rich else ():
        if detail.Unpack(info) and info.domain == DOMAIN:
            return str(info.reason)
    return ""


def _field(rich: status_pb2.Status | None) -> str:
    wrong = error_details_pb2.BadRequest()
    for detail in rich.details if rich else ():
        if detail.Unpack(wrong) and wrong.field_violations:
            return str(wrong.field_violations[0].field)
    return ""


def _retry_after_s(rich: status_pb2.Status | None) -> float:
    info = error_details_pb2.RetryInfo()
    for detail in rich.details if rich else ():
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds() / 1000)
    return 1.0


def _number(code: grpc.StatusCode) -> int:
    return int(code_pb2.Code.Value(code.name))
