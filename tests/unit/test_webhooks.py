"""Webhooks: told at least once, given up in the end, and never a matter of the run."""

from http.client import BadStatusLine
from pathlib import Path
from typing import Any

import pytest
from factories import queued_record
from fake_store import FakeStore
from receiver import receiver

from services.trainer.webhooks import Webhooks, post_json
from tandem.jobs import record as machine
from tandem.volume import Volume

URL = "http://127.0.0.1:1/hook"


class Claims(FakeStore):
    """A store with one run whose webhook is due."""

    def __init__(self, *, is_over: bool = True) -> None:
        super().__init__()
        record = machine.start(queued_record("r", webhook=URL))
        self.records["r"] = machine.finish(record, 1) if is_over else record
        self.hooks = ["r"]
        self.tries = 0

    def claim_webhook(self, for_s: float) -> tuple[str, int, str] | None:
        if not self.hooks:
            return None
        self.tries += 1
        return self.hooks[0], self.tries, "claim"

    def drop_webhook(self, run_id: str, claim: str) -> None:
        self.hooks.remove(run_id)


def webhooks(store: Any, volume: Path, post: Any) -> Webhooks:
    return Webhooks(store, Volume(volume), post)


def test_the_record_is_posted_once_it_is_over(tmp_path: Path) -> None:
    store, posted = Claims(), []
    hooks = webhooks(store, tmp_path, lambda url, document: posted.append((url, document)))
    assert hooks.tell_one()
    assert not hooks.tell_one()
    ((url, document),) = posted
    assert url == URL
    assert (document["run_id"], document["state"], document["model_version"]) == ("r", "SUCCEEDED", 1)


def test_a_receiver_that_fails_is_tried_again_and_then_given_up(tmp_path: Path) -> None:
    store, tried = Claims(), []

    def refuse(url: str, document: dict[str, Any]) -> None:
        tried.append(url)
        raise [OSError("connection refused"), BadStatusLine("hello")][len(tried) % 2]

    hooks = webhooks(store, tmp_path, refuse)
    before = store.records["r"]
    while hooks.tell_one():
        assert len(tried) <= 5
    assert len(tried) == 5
    assert store.records["r"] == before, "the run is not touched"


def test_a_run_that_was_resumed_meanwhile_is_told_at_its_next_end(tmp_path: Path) -> None:
    store, posted = Claims(is_over=False), []
    assert webhooks(store, tmp_path, lambda *each: posted.append(each)).tell_one()
    assert not posted
    assert not store.hooks


def test_json_goes_over_http_and_only_to_the_address_given() -> None:
    with receiver() as (address, got):
        post_json(f"{address}/hook", {"run_id": "r"})
        for path in ("/away", "/no"):
            with pytest.raises(OSError, match="HTTP Error"):
                post_json(f"{address}{path}", {})
    assert got == [("/hook", {"run_id": "r"}), ("/away", {}), ("/no", {})]
