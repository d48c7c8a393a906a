"""Logs on standard error: lines for people, or JSON documents for a collector, one a line."""

import json
import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any


class JsonFormatter(logging.Formatter):
    """Writes a record as {"at", "level", "logger", "message"}, with "run_id" and "error" where it has them.

    `at` is ISO 8601 in UTC, to the millisecond; `error` is the exception with its traceback in one string. What a
    record has as `fields`, a mapping given as `extra`, comes along under its own names.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        document: dict[str, Any] = {
            "at": _utc(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if run_id := getattr(record, "run_id", None):
            document["run_id"] = str(run_id)
        document |= getattr(record, "fields", None) or {}
        if error := self._error(record):
            document["error"] = error
        # ASCII, since a terminal's locale could not break it, nor a reader that takes U+2028 for the end of a line.
        return json.dumps(document)

    def _error(self, record: logging.LogRecord) -> str:
        exception = self.formatException(record.exc_info) if record.exc_info else record.exc_text
        return "\n".join(part for part in (exception, record.stack_info) if part)


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds what it knows to `extra` of each record; what the call itself gives comes first."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the call's arguments with the adapter's `extra` merged in (Python 3.13 has merge_extra for it)."""
        return msg, {**kwargs, "extra": {**(self.extra or {}), **(kwargs.get("extra") or {})}}


def run_logger(log: logging.Logger, run_id: str) -> RunLogger:
    """Return `log` for what happens to one run: its records carry `run_id`."""
    return RunLogger(log, {"run_id": run_id})


def configure_logging(level: str, format: str = "text") -> None:
    """Send all records from `level` on to standard error in `format`, text or json; replaces what was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if format == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # A warning of a library is several lines on standard error otherwise.
    logging.captureWarnings(True)


def _utc(seconds: float) -> str:
    at = datetime.fromtimestamp(seconds, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
