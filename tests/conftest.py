"""Lies here so that pytest puts this directory on the path: tests import `factories` by its name."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests side by side, and what they start: threads that wait for one another would cost ten times what they bring.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
