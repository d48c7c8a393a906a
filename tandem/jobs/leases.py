"""Who holds a run, and what expires by itself in Redis: leases, locks, backoffs.

tandem:lease:<run_id>     token of the worker that holds the run
tandem:lock:<name>        token of the process that does what one at a time may do
tandem:delayed:<queue>    runs that wait for the end of their backoff, by when that is; tandem:delays: their queues
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import redis

from tandem.jobs import scripts
from tandem.jobs.broker import Broker
from tandem.jobs.redis_client import RedisClient

_DELAYS = "tandem:delays"
_BATCH = 1000


class Leases(RedisClient):
    """The part of a JobStore that expires."""

    def __init__(self, client: "redis.Redis", address: "Broker | str" = "") -> None:
        super().__init__(client, address)
        self._renew = self._redis.register_script(scripts.RENEW)
        self._release = self._redis.register_script(scripts.RELEASE)

    def delay(self, run_id: str, queue: str, seconds: float) -> None:
        """Begin the backoff of a run, unless it has begun."""
        with self._errors():
            due = self._time() + seconds
            self._redis.zadd(_delayed(queue), {run_id: due}, nx=True)
            self._redis.hset(_DELAYS, run_id, queue)

    def due(self, queue: str) -> list[str]:
        """Return the runs of a queue whose backoff is over."""
        with self._errors():
            return list(self._redis.zrangebyscore(_delayed(queue), "-inf", self._time()))

    def count_delayed(self, queue: str) -> int:
        """Return how many runs of a queue wait for the end of their backoff."""
        with self._errors():
            return int(self._redis.zcard(_delayed(queue)))

    def drop_delay(self, run_id: str) -> None:
        """End the backoff of a run."""
        with self._errors():
            queue = self._redis.hget(_DELAYS, run_id)
            if queue is not None:
                self._redis.zrem(_delayed(str(queue)), run_id)
                self._redis.hdel(_DELAYS, run_id)

    @contextmanager
    def lock(self, name: str, ttl_s: float = 10.0) -> Iterator[bool]:
        """Hold the lock `name` if nobody else does, for at most `ttl_s`; yields whether it is held."""
        token = secrets.token_hex(8)
        key = f"tandem:lock:{name}"
        with self._errors():
            held = bool(self._redis.set(key, token, nx=True, px=int(ttl_s * 1000)))
        try:
            yield held
        finally:
            if held:
                with self._errors():
                    self._release(keys=[key], args=[token])

    def acquire_lease(self, run_id: str, token: str, ttl_s: float) -> bool:
        """Take the lease of a run if nobody holds it."""
        with self._errors():
            return bool(self._redis.set(_lease(run_id), token, nx=True, px=int(ttl_s * 1000)))

    def renew_lease(self, run_id: str, token: str, ttl_s: float) -> bool:
        """Prolong our lease; False where another holds it."""
        with self._errors():
            return bool(self._renew(keys=[_lease(run_id)], args=[token, int(ttl_s * 1000)]))

    def release_lease(self, run_id: str, token: str) -> None:
        """Give our lease back."""
        with self._errors():
            self._release(keys=[_lease(run_id)], args=[token])

    def lease(self, run_id: str) -> str | None:
        """Return the token of whoever holds the run, None where nobody does."""
        with self._errors():
            token = self._redis.get(_lease(run_id))
        return None if token is None else str(token)

    def held_leases(self, run_ids: Sequence[str]) -> dict[str, str]:
        """Return the tokens of those that hold these runs, a thousand in one question; of no others."""
        found: dict[str, str] = {}
        for first in range(0, len(run_ids), _BATCH):
            asked = run_ids[first : first + _BATCH]
            with self._errors():
                tokens = self._redis.mget([_lease(run_id) for run_id in asked])
            found |= {run_id: str(token) for run_id, token in zip(asked, tokens, strict=True) if token is not None}
        return found


def _delayed(queue: str) -> str:
    return f"tandem:delayed:{queue}"


def _lease(run_id: str) -> str:
    return f"tandem:lease:{run_id}"
