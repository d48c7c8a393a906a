"""What is told over Redis: events of runs, published models, workers that live, ends to be told by webhook.

tandem:events:<run_id>    stream of what happened, bounded
tandem:models             stream of published versions, bounded
tandem:worker:<name>      heartbeat of a worker; expires by itself
tandem:webhooks           ended runs whose webhook is to be called, by the time it is due; tandem:webhook_tries
"""

import json
from typing import Any

import redis

from tandem.jobs import scripts
from tandem.jobs.broker import Broker
from tandem.jobs.redis_client import RedisClient

MODELS_STREAM = "tandem:models"
_STREAM_LENGTH = 1000


class Announcements(RedisClient):
    """The part of a JobStore that others listen to."""

    def __init__(self, client: "redis.Redis", address: "Broker | str" = "") -> None:
        super().__init__(client, address)
        self._claim_webhook = self._redis.register_script(scripts.CLAIM_WEBHOOK)
        self._drop_webhook = self._redis.register_script(scripts.DROP_WEBHOOK)

    def add_event(self, run_id: str, event: dict[str, Any]) -> None:
        """Append to the run's stream."""
        with self._errors():
            entry = {"event": json.dumps(event)}
            self._redis.xadd(f"tandem:events:{run_id}", entry, maxlen=_STREAM_LENGTH, approximate=True)

    def announce_model(self, name: str, version: int) -> None:
        """Tell the inference servers that a version is published."""
        with self._errors():
            self._redis.xadd(MODELS_STREAM, {"name": name, "version": version}, maxlen=_STREAM_LENGTH)

    def claim_webhook(self, for_s: float) -> tuple[str, int, str] | None:
        """Return a run whose webhook is due, the number of this try, and a claim; nobody else gets it for `for_s` s."""
        with self._errors():
            claimed = self._claim_webhook(args=[for_s])
        return None if claimed is None else (str(claimed[0]), int(claimed[1]), str(claimed[2]))

    def drop_webhook(self, run_id: str, claim: str) -> None:
        """Take what was claimed off the list; a later end of the same run stays."""
        with self._errors():
            self._drop_webhook(args=[run_id, claim])

    def beat(self, worker: str, ttl_s: float, facts: dict[str, Any]) -> None:
        """Say that a worker lives."""
        with self._errors():
            self._redis.set(f"tandem:worker:{worker}", json.dumps(facts), px=int(ttl_s * 1000))

    def workers(self) -> list[dict[str, Any]]:
        """Return what the living workers say of themselves."""
        with self._errors():
            keys = sorted(self._redis.scan_iter("tandem:worker:*"))
            values = self._redis.mget(keys) if keys else []
        return [json.loads(value) for value in values if value is not None]
