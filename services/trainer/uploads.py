"""Uploads the checkpoints of one attempt while it computes, in a thread of the supervisor.

What the volume keeps, the store gets, the newest first; what a run has pruned is removed there. A checkpoint that is
damaged, or gone with its disk, stays in the store, which is there for that. The store may be away for as long as it
likes: training goes on, the log says so once, and what is newest by then is uploaded when it is back.
"""

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tandem.checkpoints.files import list_checkpoints, manifest_digest
from tandem.checkpoints.protection import pins_in_force
from tandem.checkpoints.store.attempts import begin_attempt, check_attempt
from tandem.checkpoints.store.objects import ObjectStore
from tandem.checkpoints.store.transfer import Stored, list_stored, remove_stored, stored_name, upload_checkpoint
from tandem.errors import CheckpointCorrupt, Superseded, TandemError
from tandem.logs import run_logger
from tandem.volume import Volume

log = logging.getLogger(__name__)

# Where a checkpoint is held by a second name while it goes up: the run may remove it meanwhile.
_STAGING = "uploading"
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0
# A checkpoint whose event was lost is found by then.
_LOOK_S = 10.0


class Uploads:
    """The uploads of the run directory `run`; begins with `with`, and ends there, uploaded or not."""

    def __init__(self, store: ObjectStore, run: Path, attempt: int) -> None:
        self._store, self._run, self._attempt = store, run, attempt
        self._log = run_logger(log, run.name)
        self._wake, self._over = threading.Event(), threading.Event()
        self._settled = threading.Condition()
        # Counts of the wishes to look, and of the last one that was fulfilled.
        self._asked = self._done = 0
        self._has_begun = False
        self._stored: dict[str, Stored] | None = None
        # Folders of damaged checkpoints, and of those that are in the store and were here too.
        self._refused: set[str] = set()
        self._seen: set[str] = set()
        self._is_away = False
        self._superseded: Superseded | None = None
        self._thread = threading.Thread(target=self._keep_uploading, name=f"uploads-{run.name}", daemon=True)

    def __enter__(self) -> "Uploads":
        shutil.rmtree(self._run / _STAGING, ignore_errors=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._wake.set()
        # An object in hand may take long; it becomes whole or is none, and its checkpoint has no manifest yet.
        self._thread.join(timeout=_FIRST_RETRY_S)

    def look(self) -> None:
        """Look for new checkpoints now."""
        with self._settled:
            self._asked += 1
        self._wake.set()

    def check(self) -> None:
        """Raise Superseded if the store says that a later attempt has begun."""
        if self._superseded is not None:
            raise self._superseded

    def finish(self, may_wait: Callable[[], bool]) -> bool:
        """Wait until all that the volume keeps is in the store; False once `may_wait()` is false before.

        Raises Superseded if a later attempt has begun.
        """
        self.look()
        with self._settled:
            wanted = self._asked
            while self._done < wanted and may_wait():
                self.check()
                self._settled.wait(0.25)
            self.check()
            return self._done >= wanted

    def _keep_uploading(self) -> None:
        retry_s = _FIRST_RETRY_S
        while not self._over.is_set() and self._superseded is None:
            self._wake.clear()
            with self._settled:
                asked = self._asked
            try:
                self._bring_up_to_date()
                self._say_back()
                retry_s = _FIRST_RETRY_S
                with self._settled:
                    self._done = asked
                    self._settled.notify_all()
                self._wake.wait(_LOOK_S)
            except Superseded as error:
                self._superseded = error
            except Exception as error:  # noqa: BLE001 - whoever waits for this thread would wait for ever
                self._say_away(error)
                self._over.wait(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)

    def _bring_up_to_date(self) -> None:
        if not self._has_begun:
            begin_attempt(self._store, self._run.name, self._attempt)
            self._has_begun = True
        if self._stored is None:
            self._stored = {each.folder: each for each in list_stored(self._store, self._run.name)}
        while (checkpoint := self._newest_missing()) is not None and not self._over.is_set():
            self._upload(checkpoint)
        self._remove_what_is_gone()

    def _newest_missing(self) -> Path | None:
        assert self._stored is not None
        for checkpoint in reversed(list_checkpoints(self._run)):
            folder = _folder(checkpoint)
            if folder is not None and folder not in self._stored and folder not in self._refused:
                return checkpoint
        return None

    def _upload(self, checkpoint: Path) -> None:
        assert self._stored is not None
        check_attempt(self._store, self._run.name, self._attempt)
        began = time.monotonic()
        with _held(checkpoint, self._run / _STAGING) as source:
            if source is None:
                return
            name, folder = checkpoint.name, _folder(source)
            num_bytes = sum(file.stat().st_size for file in source.iterdir())
            try:
                digest = upload_checkpoint(self._store, self._run.name, name, source)
            except CheckpointCorrupt as error:
                self._log.warning("run %s: not uploaded: %s", self._run.name, error)
                self._refused.add(folder or "")
                return
        stored = Stored(self._run.name, name, stored_name(name, digest), num_bytes)
        self._stored[stored.folder] = stored
        seconds = time.monotonic() - began
        self._log.info("run %s: %s is in the store (%.1f MB, %.1f s)", self._run.name, name, num_bytes / 1e6, seconds)

    def _remove_what_is_gone(self) -> None:
        """Remove from the store what this attempt saw on the volume, and the run has pruned since."""
        assert self._stored is not None
        pruned = self._pruned(self._stored)
        if not pruned or self._over.is_set():
            return
        pins = pins_in_force(Volume(self._run.parent.parent), self._run.name)
        if pins.unreadable:
            return
        check_attempt(self._store, self._run.name, self._attempt)
        for stored in pruned:
            if stored.step not in pins.steps:
                remove_stored(self._store, [stored])
                self._seen.discard(stored.folder)
                del self._stored[stored.folder]

    def _pruned(self, there: dict[str, Stored]) -> list[Stored]:
        """Return what is in the store, was here, and has gone from here, while a later one is both here and there.

        A run prunes what later checkpoints make superfluous, and never its newest. A volume that is gone shows none.
        """
        here = list_checkpoints(self._run)
        whole = {folder for checkpoint in here if (folder := _folder(checkpoint)) in there}
        self._seen |= whole
        names, newest = {checkpoint.name for checkpoint in here}, max((there[each].step for each in whole), default=-1)
        seen = [there[folder] for folder in sorted(self._seen)]
        return [each for each in seen if each.name not in names and each.step < newest]

    def _say_away(self, error: Exception) -> None:
        if not self._is_away:
            # Whoever runs the store can mend what it says; for anything else there is where it came from.
            origin = None if isinstance(error, TandemError | OSError) else error
            message = "run %s goes on, and what it saves is uploaded later: %s"
            self._log.warning(message, self._run.name, error, exc_info=origin)
        self._is_away = True

    def _say_back(self) -> None:
        if self._is_away:
            self._log.info("run %s: the object store has all checkpoints again", self._run.name)
        self._is_away = False


def _folder(checkpoint: Path) -> str | None:
    """Return the folder that a checkpoint has in the store, None where it is gone or can't be read."""
    try:
        return stored_name(checkpoint.name, manifest_digest(checkpoint))
    except OSError:
        return None


@contextmanager
def _held(checkpoint: Path, staging: Path) -> Iterator[Path | None]:
    """Give a checkpoint's files second names that keep their bytes whatever becomes of the first; None if it is gone.

    They are on the same file system, so nothing is copied.
    """
    held = staging / secrets.token_hex(4) / checkpoint.name
    held.mkdir(parents=True)
    try:
        try:
            for file in checkpoint.iterdir():
                os.link(file, held / file.name)
        except FileNotFoundError:
            yield None
        else:
            yield held
    finally:
        shutil.rmtree(held.parent, ignore_errors=True)
