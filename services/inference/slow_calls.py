"""The log of slow calls: one line with where the time went, never what the caller sent or got."""

import logging
import re
import time
from collections.abc import Callable
from typing import Any

from services.inference.context import is_ours
from services.inference.observation import Observed, current_call

# As many at once; after that one a second. A server under overload is not to write a line for each call.
BURST = 10
PER_S = 1.0
# What does not look so is the caller's text, and stays out of the log.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")

log = logging.getLogger("tandem.inference.slow")


class SlowCalls:
    """An Observer's listener that logs calls of `slow_ms` and more, and those whose deadline passed.

    A stream is as slow as its first answer: it may last for good reasons.
    """

    def __init__(self, slow_ms: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._slow_s = slow_ms / 1000
        self._clock = clock
        self._left, self._counted_at = float(BURST), clock()
        self._num_left_out = 0

    def __call__(self, call: Observed) -> None:
        """Log `call` if it was slow, and there is room for a line."""
        if not is_ours(call.method):
            return
        took_s = call.first_answer_s if call.is_stream else call.total_s
        if took_s < self._slow_s and call.code != "DEADLINE_EXCEEDED":
            return
        if not self._has_room():
            self._num_left_out += 1
            return
        fields = {**describe(call), "num_left_out": self._num_left_out}
        self._num_left_out = 0
        log.warning("%s", _line(fields), extra={"fields": fields})

    def _has_room(self) -> bool:
        now = self._clock()
        self._left = min(float(BURST), self._left + (now - self._counted_at) * PER_S)
        self._counted_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class CallFields(logging.Filter):
    """Adds to each record that is written within a call which one it was; passes all."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Give `record` the fields of the call."""
        if (call := current_call()) is not None:
            record.fields = {**identity(call), **getattr(record, "fields", {})}
        return True


def identity(call: Observed) -> dict[str, Any]:
    """Return what tells `call` from others, as fields of a log record."""
    fields: dict[str, Any] = {"call_id": call.call_id, "method": call.method}
    if call.models:
        fields["model"] = ",".join(call.models)
    if found := _TRACEPARENT.fullmatch(call.traceparent):
        fields["trace_id"] = found[1]
    return fields


def describe(call: Observed) -> dict[str, Any]:
    """Return the fields of `call` once it has ended; durations in milliseconds."""
    fields = {**identity(call), "code": call.code, "num_items": call.num_items}
    if call.num_tokens or call.num_prompt_tokens:
        fields |= {"num_prompt_tokens": call.num_prompt_tokens, "num_tokens": call.num_tokens}
    if call.is_stream:
        fields["first_answer_ms"] = round(call.first_answer_s * 1000, 1)
    for name in ("decode", "queue", "compute", "total"):
        fields[f"{name}_ms"] = round(getattr(call, f"{name}_s") * 1000, 1)
    fields["peer"] = call.peer
    if call.error_id:
        fields["error_id"] = call.error_id
    return fields


def _line(fields: dict[str, Any]) -> str:
    rest = " ".join(f"{name}={value}" for name, value in fields.items() if name not in ("method", "call_id"))
    return f"slow call {fields['method']} {rest} call_id={fields['call_id']}"
