"""Parameters of requests and tensors, taken one by one; what is left over is told, so that no typing error is lost."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.inference.callers import deadline_of, priority_of
from services.inference.context import Context
from services.inference.scheduler import Priority
from tandem.errors import InvalidRequest
from tandem.wire.limits import MAX_BIAS_CHARACTERS
from tandem.wire.oip import grpc_service_pb2 as pb

_INTEGERS = ("int64_param", "uint64_param")
# As `priority` counts them; 0 leaves it to the call's metadata.
_PRIORITIES = {1: Priority.HIGH, 2: Priority.NORMAL, 3: Priority.LOW}


def quoted(text: str) -> str:
    """Return what a caller wrote as it may stand in a message."""
    return repr(text if len(text) <= 80 else text[:79] + "…")


class Parameters:
    """The parameters of `where` ("parameters", or those of a tensor); each getter takes one away."""

    def __init__(self, messages: Mapping[str, pb.InferParameter], where: str = "parameters") -> None:
        self._left = dict(messages.items())
        self._where = where
        self._asked: list[str] = []

    def integer(self, name: str) -> int | None:
        """Return a whole number, or None without it; raise InvalidRequest for another kind."""
        value = self._take(name, *_INTEGERS, kind="a whole number")
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        """Return a number, or None without it; raise InvalidRequest for another kind."""
        value = self._take(name, "double_param", *_INTEGERS, kind="a number")
        return None if value is None else float(value)

    def flag(self, name: str) -> bool:
        """Return a truth value, False without it; raise InvalidRequest for another kind."""
        return bool(self._take(name, "bool_param", kind="true or false"))

    def text(self, name: str) -> str:
        """Return a text, empty without it; raise InvalidRequest for another kind."""
        return str(self._take(name, "string_param", kind="a text") or "")

    def numbers(self, name: str) -> dict[str, float]:
        """Return the numbers by word of a JSON object, none without it; raise InvalidRequest for another kind."""
        text = self.text(name)
        if len(text) > MAX_BIAS_CHARACTERS:
            raise self._wrong(name, f"has {len(text):,} characters; the limit is {MAX_BIAS_CHARACTERS:,}")
        try:
            # Pairs, since an object would keep the last of two.
            found = json.loads(text or "{}", parse_int=float, object_pairs_hook=tuple)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, tuple) or not all(isinstance(number, float) for _, number in found):
            raise self._wrong(name, 'must be a JSON object of words and numbers: {"the": -2}')
        if len(dict(found)) < len(found):
            raise self._wrong(name, "names a word twice")
        return dict(found)

    def finish(self) -> None:
        """Raise InvalidRequest if something is left that nobody asked for."""
        for name in self._left:
            known = ", ".join(sorted(self._asked)) or "none"
            raise self._wrong(name, f"is no parameter here; there are: {known}")

    def _take(self, name: str, *choices: str, kind: str) -> Any:
        self._asked.append(name)
        message = self._left.pop(name, None)
        if message is None:
            return None
        choice = message.WhichOneof("parameter_choice")
        if choice not in choices:
            raise self._wrong(name, f"must be {kind}")
        return getattr(message, choice)

    def _wrong(self, name: str, problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self._where}: {quoted(name)} {problem}", field=f"{self._where}.{name[:80]}")


@dataclass(frozen=True)
class Terms:
    """Until when (time.monotonic()) and how urgently a request is to be answered."""

    deadline: float | None
    priority: Priority


def read_terms(parameters: Parameters, context: Context) -> Terms:
    """Take `timeout` and `priority`; raise InvalidRequest where they, or parameters of sequences, make no sense."""
    deadline, timeout_us = deadline_of(context), parameters.integer("timeout")
    if timeout_us is not None:
        if timeout_us < 0:
            raise InvalidRequest(
                f"timeout is {timeout_us}; it is in microseconds, 0 for none", field="parameters.timeout"
            )
        ends_at = time.monotonic() + timeout_us / 1e6
        deadline = deadline if not timeout_us else ends_at if deadline is None else min(deadline, ends_at)
    level = parameters.integer("priority") or 0
    if level and level not in _PRIORITIES:
        raise InvalidRequest(
            f"priority is {level}; it is 1 (high), 2, 3 (low), or 0 for none", field="parameters.priority"
        )
    # What public clients ask for streams; each of ours ends with a final answer anyway.
    parameters.flag("triton_enable_empty_final_response")
    return Terms(deadline, _PRIORITIES[level] if level else priority_of(context))


def to_parameter(value: bool | int | float | str) -> pb.InferParameter:
    """Return the message of `value`."""
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    if isinstance(value, int):
        return pb.InferParameter(int64_param=value) if value < 2**63 else pb.InferParameter(uint64_param=value)
    return pb.InferParameter(string_param=value) if isinstance(value, str) else pb.InferParameter(double_param=value)
