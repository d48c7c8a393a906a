"""Log records as lines and as JSON documents."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from tandem.errors import InvalidRequest
from tandem.logs import JsonFormatter, configure_logging, run_logger
from tandem.settings import Settings


@pytest.fixture(autouse=True)
def root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


def line_of(*args: Any, level: int = logging.INFO, run_id: str = "", **kwargs: Any) -> str:
    """Return what one record becomes, with the end of its line."""
    log, out = logging.getLogger("tandem.test"), io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter())
    log.handlers, log.propagate, log.level = [handler], False, logging.DEBUG
    (run_logger(log, run_id) if run_id else log).log(level, *args, **kwargs)
    return out.getvalue()


def test_a_record_is_one_document_a_line() -> None:
    document = json.loads(line_of("lost %d of %s", 3, "five", level=logging.WARNING))
    at = document.pop("at")
    assert document == {"level": "WARNING", "logger": "tandem.test", "message": "lost 3 of five"}
    assert at.endswith("Z")
    assert len(at) == len("2026-11-24T01:18:25.123Z")
    assert abs(datetime.fromisoformat(at).timestamp() - datetime.now().timestamp()) < 60


@pytest.mark.parametrize(
    "text", ["two\nlines", "a\r\nb", "\x85 \u2028 \u2029 \x0b \x0c", 'quotes " and \\', "Köln 東京 \ud800"]
)
def test_nothing_in_a_message_breaks_its_line(text: str) -> None:
    line = line_of("%s", text)
    assert line.splitlines() == [line.removesuffix("\n")]
    assert line.isascii()
    assert json.loads(line)["message"] == text


def test_an_exception_is_one_string_with_its_traceback() -> None:
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        line = line_of("it failed", level=logging.ERROR, exc_info=True)
    assert len(line.splitlines()) == 1
    error = json.loads(line)["error"]
    assert error.startswith("Traceback (most recent call last):\n")
    assert error.endswith("ValueError: line one\nline two")


def test_records_about_a_run_carry_its_id() -> None:
    assert json.loads(line_of("begins", run_id="r-1"))["run_id"] == "r-1"
    assert json.loads(line_of("begins", run_id="r-1", extra={"run_id": "r-2"}))["run_id"] == "r-2"
    assert json.loads(line_of("begins", extra={"run_id": "r-3"}))["run_id"] == "r-3"
    assert "run_id" not in json.loads(line_of("begins"))


def test_the_format_is_set_for_all_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    configure_logging("INFO", "json")
    logging.getLogger("celery.worker").info("ready")
    configure_logging("WARNING", "text")
    logging.getLogger("a").info("not shown")
    logging.getLogger("a").warning("shown")
    first, second = out.getvalue().splitlines()
    assert json.loads(first)["logger"] == "celery.worker"
    assert second.endswith(" WARNING shown")


def test_the_setting_knows_two_formats() -> None:
    assert Settings.from_environment({}).log_format == "text"
    assert Settings.from_environment({"TANDEM_LOG_FORMAT": "JSON"}).log_format == "json"
    with pytest.raises(InvalidRequest, match="TANDEM_LOG_FORMAT='xml' is none of text, json"):
        Settings.from_environment({"TANDEM_LOG_FORMAT": "xml"})
