"""A JobStore in memory with a clock of its own, for tests of what is decided over Redis rather than by it."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tandem.errors import RunNotFound, Superseded
from tandem.jobs.record import LIVE_STATES, JobRecord, State


class FakeStore:
    """What the reaper, chains and supervisors use of a JobStore; `forget` is a broker that loses its data."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.began = 0.0
        self.records: dict[str, JobRecord] = {}
        self.leases: dict[str, tuple[str, float]] = {}
        self.delays: dict[str, float] = {}
        self.queue: list[str] = []
        self.missing: list[str] = []
        self.reconciled_in = ""
        self.lives = 1

    def forget(self) -> None:
        self.records, self.leases, self.delays, self.queue = {}, {}, {}, []
        self.restart()

    def restart(self) -> None:
        self.lives, self.began = self.lives + 1, self.now

    def send(self, record: JobRecord) -> None:
        self.queue.append(record.run_id)

    def life(self) -> tuple[str, float]:
        return str(self.lives), self.now - self.began

    def reconciled(self) -> str:
        return self.reconciled_in

    def set_reconciled(self, life: str) -> None:
        self.reconciled_in = life

    def create(self, record: JobRecord) -> None:
        self.records.setdefault(record.run_id, record)

    def get(self, run_id: str) -> JobRecord | None:
        return self.records.get(run_id)

    def get_many(self, run_ids: Iterable[str]) -> dict[str, JobRecord]:
        return {run_id: self.records[run_id] for run_id in run_ids if run_id in self.records}

    def update(self, run_id: str, change: Callable[[JobRecord], JobRecord], attempt: int | None = None) -> JobRecord:
        if run_id not in self.records:
            raise RunNotFound(run_id)
        record = self.records[run_id]
        if attempt is not None and record.attempt != attempt:
            raise Superseded(f"attempt {attempt}")
        self.records[run_id] = change(record)
        return self.records[run_id]

    def put_newer(self, record: JobRecord) -> bool:
        there = self.records.get(record.run_id)
        if there is not None and there.revision >= record.revision:
            return False
        self.records[record.run_id] = record
        return True

    def runs_in(self, state: State, queue: str = "") -> list[str]:
        return sorted(
            record.run_id
            for record in self.records.values()
            if record.state is state and (state is not State.QUEUED or record.queue == queue)
        )

    def count_queued(self, queue: str) -> int:
        return len(self.runs_in(State.QUEUED, queue))

    def live(self) -> list[JobRecord]:
        return [record for record in self.records.values() if record.state in LIVE_STATES]

    def queues(self) -> list[str]:
        return sorted({record.queue for record in self.records.values()})

    def runs_of_sweep(self, sweep: str) -> list[str]:
        return sorted(record.run_id for record in self.records.values() if record.sweep == sweep)

    def unmirrored(self) -> list[str]:
        return list(self.missing)

    def drop_unmirrored(self, run_id: str) -> None:
        self.missing.remove(run_id)

    def count_messages(self, keys: list[str]) -> list[int]:
        return [len(self.queue), *(0 for _ in keys[1:])]

    def messages(self, keys: list[str]) -> list[str]:
        def message(run_id: str) -> str:
            body: list[Any] = [[run_id], {}, {}]
            return json.dumps({"body": base64.b64encode(json.dumps(body).encode()).decode()})

        return [message(run_id) for run_id in self.queue]

    def delay(self, run_id: str, queue: str, seconds: float) -> None:
        self.delays.setdefault(run_id, self.now + seconds)

    def due(self, queue: str) -> list[str]:
        return [run_id for run_id, due in self.delays.items() if due <= self.now]

    def count_delayed(self, queue: str) -> int:
        return len(self.delays)

    def drop_delay(self, run_id: str) -> None:
        self.delays.pop(run_id, None)

    def lease(self, run_id: str) -> str | None:
        token, until = self.leases.get(run_id, ("", 0.0))
        return token if until > self.now else None

    def held_leases(self, run_ids: Sequence[str]) -> dict[str, str]:
        return {run_id: token for run_id in run_ids if (token := self.lease(run_id)) is not None}

    def acquire_lease(self, run_id: str, token: str, ttl_s: float) -> bool:
        return self.lease(run_id) is None and self.renew_lease(run_id, token, ttl_s)

    def renew_lease(self, run_id: str, token: str, ttl_s: float) -> bool:
        if self.lease(run_id) not in (None, token):
            return False
        self.leases[run_id] = (token, self.now + ttl_s)
        return True

    def release_lease(self, run_id: str, token: str) -> None:
        if self.lease(run_id) == token:
            del self.leases[run_id]

    @contextmanager
    def lock(self, name: str, ttl_s: float = 10.0) -> Iterator[bool]:
        yield True
