"""A worker that carries one run and ends: where each run gets a machine of its own, as the pod of a job.

It ends as a worker ends that was told to stop, so that a message which came to it in the last moment goes back into
the queue. A message that moves nothing (its run is over, or another's) is no run; if none comes for a while it ends
too, since what was waiting has been taken by another.
"""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from celery import signals

log = logging.getLogger(__name__)

_TICK_S = 0.5


class OneRun:
    """Ends the worker after its first run, or after `idle_exit_s` seconds without one."""

    def __init__(self, idle_exit_s: float) -> None:
        self._idle_exit_s = idle_exit_s

    def end(self, worker: int) -> None:
        """Tell the worker, from its child, that its run has ended."""
        log.info("the run of this worker has ended: it ends too")
        os.kill(worker, signal.SIGTERM)

    def watch(self, folder: Path) -> None:
        """End this worker once none of its children, each with a file in `folder` while it is busy, has had a run."""

        def begin(**_: Any) -> None:
            threading.Thread(target=self._watch, args=(folder,), name="idle", daemon=True).start()

        signals.worker_ready.connect(begin, weak=False)

    def _watch(self, folder: Path) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < self._idle_exit_s:
            time.sleep(_TICK_S)
            if any(folder.glob("busy-*")):
                idle_since = time.monotonic()
        log.info("no run came in %g s: this worker ends", self._idle_exit_s)
        os.kill(os.getpid(), signal.SIGTERM)
