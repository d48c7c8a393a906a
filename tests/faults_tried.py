"""How often each class of fault was tried in this session: counted by tests, printed at its end.

With pytest-xdist each worker counts by itself, and hands its counts to the controller, which prints the sum. This is a
plugin of `tests/conftest.py`: the controller reads no conftest of a folder further down.
"""

from collections import Counter
from typing import Any

import pytest

_COUNTS = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    counts: Counter[str] = Counter()
    config.stash[_COUNTS] = counts


@pytest.fixture(scope="session")
def tried(pytestconfig: pytest.Config) -> "Counter[str]":
    """Return the counter of this session: `tried["what was broken, and how"] += 1`."""
    return pytestconfig.stash[_COUNTS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        counts = session.config.stash[_COUNTS]
        output["faults_tried"] = dict(counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    # A worker that crashed has no output.
    node.config.stash[_COUNTS].update(getattr(node, "workeroutput", {}).get("faults_tried", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash[_COUNTS]
    if counts:
        terminalreporter.write_sep("=", f"faults tried: {counts.total()}")
        for name, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:6} {name}")
