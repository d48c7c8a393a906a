"""Whether the worker lives: it touches a file each 2 s, and `python -m services.trainer.health` looks at its age.

A file and no question to the worker: `celery inspect ping` starts a Celery application for each check, and needs the
broker. An outage of the broker must not restart a worker whose run computes on. The check takes 0.07 s (a bare
interpreter: 0.04 s; one core, medians of 3), since it imports neither celery nor torch.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tandem.errors import BrokerUnavailable, TandemError, Unavailable
from tandem.settings import heartbeat_file

log = logging.getLogger(__name__)

MAX_AGE_S = 30.0
_INTERVAL_S = 2.0
# The worker's loop turns at least each 2 s, unless it waits for the broker.
_LOOP_PATIENCE_S = 6.0
# For so long Celery may go on waiting after the broker has come back: it tries again each 32 s at most.
_RECONNECT_S = 60.0


class Heartbeat:
    """Touches `path` while the worker's loop turns, or has reason not to: the broker is away, or was just now.

    Celery's loop stands still while it connects, so the beat can't be its own. `ping` raises BrokerUnavailable.
    """

    def __init__(self, path: Path, ping: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._ping, self._clock = path, ping, clock
        self._turned_at = self._away_at = float("-inf")
        self._complaint = ""

    def loop_turned(self) -> None:
        """Note that the worker's loop does its work."""
        self._turned_at = self._clock()

    def start(self) -> None:
        """Beat from now on, in a thread that ends with the process."""
        threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True).start()

    def _keep_beating(self) -> None:
        while True:
            self.beat()
            time.sleep(_INTERVAL_S)

    def beat(self) -> None:
        """Touch the file if all is well."""
        if self._loop_turns() or self._broker_is_away():
            self._touch()

    def _loop_turns(self) -> bool:
        return self._clock() - self._turned_at < _LOOP_PATIENCE_S

    def _broker_is_away(self) -> bool:
        try:
            self._ping()
        except BrokerUnavailable:
            self._away_at = self._clock()
        return self._clock() - self._away_at < _RECONNECT_S

    def _touch(self) -> None:
        try:
            # Its name in the temporary directory is known: no link that another put there is followed.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with contextlib.closing(os.fdopen(descriptor, "wb")):
                os.utime(descriptor)
        except OSError as error:
            # Not a reason to end; and said once, not each 2 s.
            if str(error) != self._complaint:
                log.warning("no heartbeat file: %s; set TANDEM_HEARTBEAT_FILE", error)
            self._complaint = str(error)


def check(path: Path) -> None:
    """Return if the heartbeat at `path` is younger than MAX_AGE_S; raise Unavailable saying what is wrong."""
    try:
        touched_at = path.stat().st_mtime
    except OSError as error:
        raise Unavailable(
            f"no heartbeat at {path}: {error.strerror}; is the worker up, with the same TANDEM_HEARTBEAT_FILE?"
        ) from error
    # A file from the future is one from before the clock was set back.
    age_s = abs(time.time() - touched_at)
    if age_s >= MAX_AGE_S:
        raise Unavailable(f"the worker's last heartbeat at {path} was {age_s:.0f} s ago, {MAX_AGE_S:.0f} s are allowed")


def main() -> None:
    """Exit 0 if the worker lives, 1 with one line if not."""
    try:
        check(heartbeat_file())
    except TandemError as error:
        sys.exit(f"tandem trainer: {error}")


if __name__ == "__main__":
    main()
