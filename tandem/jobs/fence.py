"""The fence of a run on the volume: the number of the newest attempt, and a lock that its writes are made under.

    runs/<run_id>/fence         the number; `closed` after it once that attempt may write no more
                  .fence.lock   locked (flock) while the number is raised and while files are put in place

The record in Redis fences states; this fences files, whatever Redis has forgotten. An attempt checks the number and
moves its files under one lock, so that between the two no other can begin: a stale one never writes.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import Superseded, VolumeUnavailable
from tandem.volume import replace_file, volume_errors

_FILE = "fence"
_LOCK = ".fence.lock"
_CLOSED = "closed"
_POLL_S = 0.02
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Fence:
    """The fence of the run directory `run`."""

    run: Path

    def number(self) -> int:
        """Return the newest attempt that has begun, 0 before the first; raise VolumeUnavailable if it can't be read."""
        return self._read()[0]

    def _read(self) -> tuple[int, bool]:
        path = self.run / _FILE
        try:
            number, *rest = path.read_text(encoding="ascii").split()
            return int(number), rest == [_CLOSED]
        except FileNotFoundError:
            return 0, False
        except (OSError, ValueError) as error:
            raise VolumeUnavailable(f"{path} can't be read: {error}") from error

    def raise_to(self, attempt: int, while_waiting: Callable[[], None]) -> None:
        """Let `attempt` begin and end the right of all before it; raise Superseded if it is not above them.

        Waits until no earlier attempt is putting files in place, which takes milliseconds unless that process is
        frozen in the middle; `while_waiting` is called several times a second meanwhile.
        """
        with volume_errors(self.run), self.locked(while_waiting):
            if self.number() >= attempt:
                raise Superseded(f"attempt {self.number()} of run {self.run.name} has begun; attempt {attempt} may not")
            replace_file(self.run / _FILE, b"%d\n" % attempt)

    def close(self, attempt: int) -> None:
        """End the right of `attempt` and of all before it to write, though none has followed; later ones keep theirs.

        Raises VolumeUnavailable if an attempt is putting files in place for half a minute.
        """
        with volume_errors(self.run), self.locked():
            if self.number() <= attempt:
                replace_file(self.run / _FILE, b"%d %s\n" % (attempt, _CLOSED.encode()))

    @contextmanager
    def held(self, attempt: int) -> Iterator[None]:
        """Keep later attempts from beginning; raise Superseded if one has."""
        with volume_errors(self.run), self.locked():
            self.check(attempt)
            yield

    def check(self, attempt: int) -> None:
        """Raise Superseded if an attempt after `attempt` has begun, or it has been closed."""
        number, is_closed = self._read()
        if number > attempt:
            raise Superseded(f"attempt {number} of run {self.run.name} has begun; attempt {attempt} stops")
        if number == attempt and is_closed:
            raise Superseded(f"attempt {attempt} of run {self.run.name} was given up; it stops")

    @contextmanager
    def locked(self, while_waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the lock; without `while_waiting`, VolumeUnavailable if it can't be had for half a minute."""
        descriptor = os.open(self.run / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take(descriptor, while_waiting or patience(self.run))
            yield
        finally:
            # The kernel drops the lock with the descriptor, however its holder ends.
            os.close(descriptor)

    def _take(self, descriptor: int, while_waiting: Callable[[], None]) -> None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                while_waiting()
                time.sleep(_POLL_S)
            else:
                return


def patience(run: Path) -> Callable[[], None]:
    """Return what waits for the lock of `run` for half a minute, and then raises VolumeUnavailable."""
    deadline = time.monotonic() + _PATIENCE_S

    def wait() -> None:
        if time.monotonic() > deadline:
            raise VolumeUnavailable(f"{run / _LOCK} is held by a process that does not go on; is one frozen?")

    return wait
