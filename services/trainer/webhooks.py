"""Webhooks: tell an address that a run has ended. What comes of that never touches the run.

The broker keeps the list of what is to be told (written in the same step as the run's end), so that each end is told
at least once however workers die; a receiver tells repetitions by `run_id` and `revision`.
"""

import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from tandem import __version__
from tandem.errors import RunNotFound, TandemError
from tandem.jobs.record import JobRecord
from tandem.jobs.runs import find_run
from tandem.jobs.store import JobStore
from tandem.logs import run_logger
from tandem.volume import Volume

log = logging.getLogger(__name__)

_POLL_S = 1.0
_TIMEOUT_S = 5.0
_BACKOFF_S = 10.0
_MOST_TRIES = 5

Post = Callable[[str, dict[str, Any]], None]


class Webhooks:
    """Tells the ends of runs from a thread of its own: a slow receiver holds nothing up."""

    def __init__(
        self, store: JobStore, volume: Volume, post: "Post | None" = None, backoff_s: float = _BACKOFF_S
    ) -> None:
        self._store = store
        self._volume = volume
        self._post = post or post_json
        self._backoff_s = backoff_s

    def start(self) -> None:
        """Begin; the thread ends with the process."""
        threading.Thread(target=self._run, name="webhooks", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                while self.tell_one():
                    pass
            except TandemError as error:
                log.debug("no webhooks: %s", error)
            except Exception:  # whatever a receiver does, the next end is to be told
                log.exception("a webhook failed")
            threading.Event().wait(_POLL_S)

    def tell_one(self) -> bool:
        """Tell one end that is due; False if there is none."""
        # Put off by as long as the next try is to wait, should this one fail or its worker die.
        claimed = self._store.claim_webhook(self._backoff_s)
        if claimed is None:
            return False
        run_id, tries, claim = claimed
        if self._is_done(run_id, tries):
            self._store.drop_webhook(run_id, claim)
        return True

    def _is_done(self, run_id: str, tries: int) -> bool:
        """Tell the end of a run; return whether there is nothing more to tell of it."""
        try:
            record = find_run(run_id, self._volume, self._store)
        except RunNotFound:
            return True
        if record.webhook is None or not record.state.is_terminal or tries > _MOST_TRIES:
            # Resumed meanwhile (its next end will be told), or whoever tried last did not live to give it up.
            return True
        return self._told(record, record.webhook, tries) or tries >= _MOST_TRIES

    def _told(self, record: JobRecord, url: str, tries: int) -> bool:
        try:
            self._post(url, record.document())
        except (OSError, ValueError, HTTPException) as error:
            end = "given up" if tries >= _MOST_TRIES else f"again in {self._backoff_s:.0f} s"
            run_logger(log, record.run_id).warning(
                "run %s: webhook, try %d: %s; %s", record.run_id, tries, str(error) or type(error).__name__, end
            )
            return False
        run_logger(log, record.run_id).info("run %s: webhook told", record.run_id)
        return True


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none: the address was given, and is what may be reached."""


def post_json(url: str, document: dict[str, Any]) -> None:
    """Post `document` to `url`, http or https; raise OSError where it is not taken (any status but 2xx)."""
    headers = {"Content-Type": "application/json", "User-Agent": f"tandem/{__version__}"}
    request = urllib.request.Request(url, json.dumps(document).encode(), headers, method="POST")  # noqa: S310
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_S):
        pass
