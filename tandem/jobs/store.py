"""Job records in Redis: a thin adapter with compare-and-set.

tandem:job:<run_id>           the record as JSON; changed only by compare-and-set; expires some days after its end
tandem:state:<STATE>          the live runs in that state, by the time they came into it
tandem:state:QUEUED:<queue>   those that wait in a queue
tandem:queues                 the queues that workers have taken from; tandem:queues_used: that runs have gone to
tandem:sweep:<id>             the runs of a sweep
tandem:key:<key>              the run that was submitted with an idempotency key
tandem:unmirrored             the runs whose last state could not be written to the volume yet
tandem:reconciled             the life of the broker (its run id) in which the volume was last compared with it
"""

from collections.abc import Callable, Iterable

import redis

from tandem.errors import RunNotFound, Superseded
from tandem.jobs import scripts
from tandem.jobs.announcements import MODELS_STREAM, Announcements
from tandem.jobs.broker import Broker
from tandem.jobs.leases import Leases
from tandem.jobs.record import LIVE_STATES, JobRecord, State
from tandem.jobs.redis_client import KEEPALIVE, client_options, connect

__all__ = ["KEEPALIVE", "MODELS_STREAM", "JobStore", "client_options", "connect"]

_QUEUES = "tandem:queues"
_QUEUES_USED = "tandem:queues_used"
_RECONCILED = "tandem:reconciled"
_UNMIRRORED = "tandem:unmirrored"
_BATCH = 1000


class JobStore(Leases, Announcements):
    """The records of one broker, with what expires and what is told."""

    def __init__(self, client: "redis.Redis", address: "Broker | str" = "") -> None:
        super().__init__(client, address)
        self._create = self._redis.register_script(scripts.CREATE)
        self._compare_and_set = self._redis.register_script(scripts.COMPARE_AND_SET)

    def create(self, record: JobRecord) -> str | None:
        """Add a record. Returns None, or the run that its idempotency key belongs to; an existing record stays."""
        sweep = f"tandem:sweep:{record.sweep}" if record.sweep else ""
        args = [record.model_dump_json(), record.run_id, _set_of(record), sweep]
        with self._errors():
            answer = self._create(keys=[_key(record.run_id), _idempotency(record)], args=args)
        return answer if isinstance(answer, str) else None

    def forget(self, run_id: str) -> None:
        """Remove what is known of an ended run."""
        with self._errors():
            self._redis.delete(_key(run_id), f"tandem:events:{run_id}")

    def get(self, run_id: str) -> JobRecord | None:
        """Return the record of a run, None where Redis has none."""
        with self._errors():
            data = self._redis.get(_key(run_id))
        return None if data is None else JobRecord.model_validate_json(data)

    def get_many(self, run_ids: Iterable[str]) -> dict[str, JobRecord]:
        """Return the records there are of these runs."""
        ids, records = list(run_ids), {}
        for first in range(0, len(ids), _BATCH):
            with self._errors():
                values = self._redis.mget([_key(run_id) for run_id in ids[first : first + _BATCH]])
            found = (JobRecord.model_validate_json(value) for value in values if value is not None)
            records.update({record.run_id: record for record in found})
        return records

    def runs_in(self, state: State, queue: str = "") -> list[str]:
        """Return the live runs in `state` (QUEUED: in `queue`), the longest there first."""
        with self._errors():
            return list(self._redis.zrange(_set(state, queue), 0, -1))

    def count_queued(self, queue: str) -> int:
        """Return how many runs wait in a queue."""
        with self._errors():
            return int(self._redis.zcard(_set(State.QUEUED, queue)))

    def queued_since_s(self, queue: str) -> float:
        """Return for how many seconds the longest waiting run of a queue has been there, 0 where none waits."""
        with self._errors():
            oldest = self._redis.zrange(_set(State.QUEUED, queue), 0, 0, withscores=True)
            return max(self._time() - oldest[0][1], 0.0) if oldest else 0.0

    def count_by_state(self) -> dict[str, int]:
        """Return how many runs there are in each live state."""
        with self._errors():
            pipe = self._redis.pipeline(transaction=False)
            queues = self.queues()
            sets = [(state, queue) for state in LIVE_STATES for queue in (queues if state is State.QUEUED else [""])]
            for state, queue in sets:
                pipe.zcard(_set(state, queue))
            counts = {state.value: 0 for state in LIVE_STATES}
            for (state, _), count in zip(sets, pipe.execute(), strict=True):
                counts[state] += count
        return counts

    def queues(self) -> list[str]:
        """Return the queues that runs have gone to or workers have taken from."""
        with self._errors():
            return sorted(self._redis.sunion(_QUEUES, _QUEUES_USED))

    def served_queues(self) -> list[str]:
        """Return the queues that workers have taken from."""
        with self._errors():
            return sorted(self._redis.smembers(_QUEUES))

    def add_queues(self, queues: Iterable[str]) -> None:
        """Note that a worker takes from these queues."""
        with self._errors():
            self._redis.sadd(_QUEUES, *queues)

    def runs_of_sweep(self, sweep: str) -> list[str]:
        """Return the runs of a sweep, in the order of submission."""
        with self._errors():
            return sorted(self._redis.smembers(f"tandem:sweep:{sweep}"))

    def run_of_key(self, key: str) -> str | None:
        """Return the run that was submitted with an idempotency key."""
        with self._errors():
            found = self._redis.get(f"tandem:key:{key}")
        return None if found is None else str(found)

    def update(self, run_id: str, change: Callable[[JobRecord], JobRecord], attempt: int | None = None) -> JobRecord:
        """Apply a pure `change` to the record by compare-and-set, and return the new record.

        With `attempt`, the change is made only while that attempt is the run's current one; Superseded otherwise.
        """
        written: JobRecord | None = None
        while True:
            with self._errors():
                before = self._redis.get(_key(run_id))
            if before is None:
                raise RunNotFound(f"the broker has no record of run {run_id!r}")
            if written is not None and before == written.model_dump_json():
                # It was done, and the answer lost with its connection: the second try found it done.
                return written
            record = JobRecord.model_validate_json(before)
            if attempt is not None and record.attempt != attempt:
                raise Superseded(f"attempt {attempt} of run {run_id} is over: attempt {record.attempt} has begun")
            after = change(record)
            if after == record or self._swap(before, record, after):
                return after
            written = after

    def _swap(self, before: str, record: JobRecord, after: JobRecord) -> bool:
        told = "1" if after.state.is_terminal and after.webhook else "0"
        args = [before, after.model_dump_json(), record.run_id, _set_of(record), _set_of(after), told]
        with self._errors():
            return bool(self._compare_and_set(keys=[_key(record.run_id), _idempotency(record)], args=args))

    def put_newer(self, record: JobRecord) -> bool:
        """Put `record` in the place of an older revision, or of none; return whether it was.

        A broker that was killed may come back a second older than the volume.
        """
        if (there := self.get(record.run_id)) is None:
            self.create(record)
            return True
        if there.revision >= record.revision:
            return False
        self.update(record.run_id, lambda current: max(current, record, key=lambda each: each.revision))
        return True

    def reconciled(self) -> str:
        """Return the life of the broker in which `set_reconciled` was last called."""
        with self._errors():
            return str(self._redis.get(_RECONCILED) or "")

    def set_reconciled(self, life: str) -> None:
        """Note that in this life of the broker its records have been compared with the volume's."""
        with self._errors():
            self._redis.set(_RECONCILED, life)

    def add_unmirrored(self, run_id: str) -> None:
        """Note that the volume lacks the last state of a run."""
        with self._errors():
            self._redis.sadd(_UNMIRRORED, run_id)

    def unmirrored(self) -> list[str]:
        """Return the runs whose last state the volume lacks."""
        with self._errors():
            return sorted(self._redis.smembers(_UNMIRRORED))

    def drop_unmirrored(self, run_id: str) -> None:
        """Note that the volume has it now."""
        with self._errors():
            self._redis.srem(_UNMIRRORED, run_id)

    def count_messages(self, keys: list[str]) -> list[int]:
        """Return how many messages wait in each of these lists: a Celery queue's, one for each priority."""
        with self._errors():
            pipe = self._redis.pipeline(transaction=False)
            for key in keys:
                pipe.llen(key)
            return [int(length) for length in pipe.execute()]

    def messages(self, keys: list[str]) -> list[str]:
        """Return the messages in these lists as they lie there."""
        with self._errors():
            return [message for key in keys for message in self._redis.lrange(key, 0, -1)]


def _set(state: State, queue: str = "") -> str:
    return f"tandem:state:{state}:{queue}" if state is State.QUEUED else f"tandem:state:{state}"


def _set_of(record: JobRecord) -> str:
    return "" if record.state.is_terminal else _set(record.state, record.queue)


def _idempotency(record: JobRecord) -> str:
    return f"tandem:key:{record.key}" if record.key else ""


def _key(run_id: str) -> str:
    return f"tandem:job:{run_id}"
