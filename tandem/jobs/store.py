"""Job records in Redis: a thin adapter with compare-and-set, leases and streams.

tandem:job:<run_id>      the record as JSON; changed only by compare-and-set
tandem:live              set of run_ids that are not terminal
tandem:lease:<run_id>    token of the worker that holds the run; expires by itself
tandem:events:<run_id>   stream of what happened, bounded
tandem:models            stream that announces published versions, bounded
tandem:worker:<host>     heartbeat of a worker; expires by itself
tandem:remembers         there until the broker loses its data: then the volume gives it the unfinished runs back
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tandem.errors import BrokerUnavailable, Conflict, RunNotFound
from tandem.jobs.record import JobRecord

MODELS_STREAM = "tandem:models"
_LIVE = "tandem:live"
_REMEMBERS = "tandem:remembers"
_STREAM_LENGTH = 1000

# Sets KEYS[1] to ARGV[2] if it still is ARGV[1], and keeps the set of live runs in step.
_COMPARE_AND_SET = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
if ARGV[4] == '1' then redis.call('SADD', KEYS[2], ARGV[3]) else redis.call('SREM', KEYS[2], ARGV[3]) end
return 1
"""
# Prolongs a lease that is ours, and takes one that has lapsed; whoever took the run meanwhile raised its attempt, which
# fences us off at the next write.
_RENEW = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class LeaseLost(Conflict):
    """Another attempt has begun: this one may write nothing more."""


def client_url(url: str) -> str:
    """Return `url` as redis-py writes it: Celery's redis+socket://PATH?virtual_host=N is its unix://PATH?db=N."""
    if url.startswith("redis+socket://"):
        return url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=")
    return url


def shown_url(url: str) -> str:
    """Return `url` without user and password, for people and logs."""
    return re.sub(r"//[^/@]*@", "//", url)


def connect(url: str) -> "redis.Redis":
    """Return a client for `url` (redis, rediss, unix, or Celery's redis+socket); it connects when first used."""
    try:
        # redis-py 8 gives up after 5 s by default; a broker under load may pause longer than that.
        return redis.Redis.from_url(client_url(url), decode_responses=True, socket_timeout=10, socket_connect_timeout=3)
    except ValueError as error:
        raise BrokerUnavailable(f"TANDEM_REDIS_URL={shown_url(url)!r} is no Redis address: {error}") from error


class JobStore:
    """The records of one broker; every method raises BrokerUnavailable when it does not answer."""

    def __init__(self, client: "redis.Redis", address: str = "") -> None:
        self._redis: Any = client
        self._address = shown_url(address)
        self._compare_and_set = self._redis.register_script(_COMPARE_AND_SET)
        self._renew = self._redis.register_script(_RENEW)
        self._release = self._redis.register_script(_RELEASE)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise BrokerUnavailable(
                f"the broker at {self._address or 'TANDEM_REDIS_URL'} does not answer: {error}; is it running? "
                "'tandem status' tells"
            ) from error
        except RedisError as error:
            raise BrokerUnavailable(f"the broker refused a command: {error}") from error

    def ping(self) -> None:
        """Return if the broker answers."""
        with self._errors():
            self._redis.ping()

    def uptime_s(self) -> float:
        """Return for how many seconds the broker has been up."""
        with self._errors():
            return float(self._redis.info("server")["uptime_in_seconds"])

    def create(self, record: JobRecord) -> bool:
        """Add a record; False where the run has one already."""
        with self._errors():
            pipe = self._redis.pipeline(transaction=True)
            pipe.set(_key(record.run_id), record.model_dump_json(), nx=True)
            if not record.state.is_terminal:
                pipe.sadd(_LIVE, record.run_id)
            return bool(pipe.execute()[0])

    def get(self, run_id: str) -> JobRecord | None:
        """Return the record of a run, None where Redis has none."""
        with self._errors():
            data = self._redis.get(_key(run_id))
        return None if data is None else JobRecord.model_validate_json(data)

    def get_many(self, run_ids: list[str]) -> dict[str, JobRecord]:
        """Return the records there are of these runs, in one round trip."""
        if not run_ids:
            return {}
        with self._errors():
            values = self._redis.mget([_key(run_id) for run_id in run_ids])
        records = (JobRecord.model_validate_json(value) for value in values if value is not None)
        return {record.run_id: record for record in records}

    def live(self) -> list[str]:
        """Return the runs that are not terminal."""
        with self._errors():
            return sorted(self._redis.smembers(_LIVE))

    def update(self, run_id: str, change: Callable[[JobRecord], JobRecord], attempt: int | None = None) -> JobRecord:
        """Apply a pure `change` to the record by compare-and-set, and return the new record.

        With `attempt`, the change is made only while that attempt is the run's current one; LeaseLost otherwise.
        """
        while True:
            with self._errors():
                before = self._redis.get(_key(run_id))
            if before is None:
                raise RunNotFound(f"the broker has no record of run {run_id!r}")
            record = JobRecord.model_validate_json(before)
            if attempt is not None and record.attempt != attempt:
                raise LeaseLost(f"attempt {attempt} of run {run_id} is over: attempt {record.attempt} has begun")
            after = change(record)
            live = "0" if after.state.is_terminal else "1"
            keys, args = [_key(run_id), _LIVE], [before, after.model_dump_json(), run_id, live]
            with self._errors():
                if self._compare_and_set(keys=keys, args=args):
                    return after

    def remembers(self) -> bool:
        """True if `remember` was called since the broker last lost its data."""
        with self._errors():
            return bool(self._redis.exists(_REMEMBERS))

    def remember(self) -> None:
        """Note that the broker has the records of all unfinished runs."""
        with self._errors():
            self._redis.set(_REMEMBERS, 1)

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

    def has_lease(self, run_id: str) -> bool:
        """True while some worker holds the run."""
        with self._errors():
            return bool(self._redis.exists(_lease(run_id)))

    def add_event(self, run_id: str, event: dict[str, Any]) -> None:
        """Append to the run's stream."""
        with self._errors():
            entry = {"event": json.dumps(event)}
            self._redis.xadd(f"tandem:events:{run_id}", entry, maxlen=_STREAM_LENGTH, approximate=True)

    def announce_model(self, name: str, version: int) -> None:
        """Tell the inference servers that a version is published."""
        with self._errors():
            self._redis.xadd(MODELS_STREAM, {"name": name, "version": version}, maxlen=_STREAM_LENGTH)

    def count_messages(self, keys: list[str]) -> int:
        """Return how many messages wait in these lists: a Celery queue's, one for each priority."""
        with self._errors():
            return sum(self._redis.llen(key) for key in keys)

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


def _key(run_id: str) -> str:
    return f"tandem:job:{run_id}"


def _lease(run_id: str) -> str:
    return f"tandem:lease:{run_id}"
