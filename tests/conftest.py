"""Lies here so that pytest puts this directory on the path: tests import `factories` by its name."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest

pytest_plugins = ["faults_tried"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts what runs beside it so, and what tests interrupt would not hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests side by side, and what they start: threads that wait for one another would cost ten times what they bring.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers() -> int:
    """Return for `-n auto` one more worker than cores: at times tests wait, for leases, starts and ends.

    With two more, on two cores, servers took longer to start than their callers waited.
    """
    return (os.cpu_count() or 1) + 1


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Put the root logger's level and handlers back: services that run within a test set their own."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
