"""Workers, reapers, people and a broker that fails, in random order: what must hold whatever happens.

The record's state machine, the fence on the volume, the reaper and the chains are the real ones; broker and clock are
in memory, and a worker's steps are single ones, so that anything can come between them.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factories import queued_record
from fake_store import FakeStore
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.trainer.reaper import Reaper, wake_again
from tandem.errors import Conflict, RunNotFound, Superseded
from tandem.jobs import record as machine
from tandem.jobs.failures import Failure
from tandem.jobs.fence import Fence
from tandem.jobs.record import JobRecord, State
from tandem.jobs.runs import mirror, read_mirror
from tandem.volume import Volume

LEASE_S = 5.0
LAST_STEP = 6
WORKERS = ("a", "b", "c")


@dataclass
class Attempt:
    """What a worker holds: its record as it knows it, and how far its process has come."""

    record: JobRecord
    token: str
    step: int
    is_frozen: bool = False


class Protocol(RuleBasedStateMachine):
    """One run, three workers, a reaper in each of them; `saves` is what lies on the volume."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.volume, self.store = Volume(Path(self.folder.name)), FakeStore()
        store: Any = self.store
        self.reaper = Reaper(store, self.volume, LEASE_S, self.store.send, clock=lambda: self.store.now)
        record = queued_record("r", max_failures=1000)
        self.volume.run("r").mkdir(parents=True)
        mirror(self.volume, record)
        self.store.create(record)
        self.store.send(record)
        self.fence = Fence(self.volume.run("r"))
        self.attempts: dict[str, Attempt] = {}
        # The number of the attempt that wrote each save, in the order of writing; and which checkpoints were published.
        self.saves: list[tuple[int, int]] = []
        self.published: list[tuple[str, int]] = []
        self.tokens = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @property
    def saved_step(self) -> int:
        return self.saves[-1][1] if self.saves else 0

    def holding(self, frozen: bool = False) -> list[str]:
        return sorted(worker for worker, attempt in self.attempts.items() if attempt.is_frozen is frozen)

    # What workers do, a step at a time.

    @rule(worker=st.sampled_from(WORKERS), is_repeated=st.booleans())
    @precondition(lambda self: self.store.queue)
    def deliver(self, worker: str, is_repeated: bool) -> None:
        """A message comes to an idle worker; some come twice."""
        if worker in self.attempts:
            return
        run_id = self.store.queue[0] if is_repeated else self.store.queue.pop(0)
        self.tokens += 1
        token = f"elsewhere/1/1/{self.tokens}"
        record = self.store.get(run_id)
        if record is None or record.state not in (State.QUEUED, State.RUNNING):
            return
        if not self.store.acquire_lease(run_id, token, LEASE_S):
            return
        try:
            record = self.store.update(run_id, self.take)
            if record.state is not State.RUNNING:
                self.store.release_lease(run_id, token)
                return
            self.fence.raise_to(record.attempt, while_waiting=lambda: None)
        except Conflict:
            self.store.release_lease(run_id, token)
            return
        mirror(self.volume, record)
        self.attempts[worker] = Attempt(record, token, self.saved_step)

    def take(self, record: JobRecord) -> JobRecord:
        if record.state is State.RUNNING:
            record = machine.requeue(record, "its worker was lost", Failure.WORKER_LOST)
        if record.state is State.QUEUED and not record.delayed:
            return machine.start(record, self.fence.number())
        return record

    @rule(data=st.data(), does_save=st.booleans())
    @precondition(lambda self: self.holding())
    def compute(self, data: st.DataObject, does_save: bool) -> None:
        """A process comes a step further, saves perhaps, and its supervisor renews and reports."""
        self.come_further(data.draw(st.sampled_from(self.holding())), does_save)

    def come_further(self, worker: str, does_save: bool) -> None:
        attempt = self.attempts[worker]
        attempt.step = min(attempt.step + 1, LAST_STEP)
        try:
            if does_save:
                with self.fence.held(attempt.record.attempt):
                    self.saves.append((attempt.record.attempt, attempt.step))
                    current = self.store.records.get("r")
                    assert current is None or not self.is_over(current, attempt), "written after the end"
            if not self.store.renew_lease("r", attempt.token, LEASE_S):
                raise Conflict("the lease is another's")
            attempt.record = self.write(attempt, lambda record: machine.saved(record, self.saved_step))
            mirror(self.volume, attempt.record)
        except Conflict:
            del self.attempts[worker]

    @staticmethod
    def is_over(record: JobRecord, attempt: Attempt) -> bool:
        return record.state.is_terminal and record.attempt >= attempt.record.attempt

    def write(self, attempt: Attempt, change: Any) -> JobRecord:
        """As a supervisor writes: the broker may have forgotten, all or the last second."""
        try:
            return self.store.update("r", change, attempt=attempt.record.attempt)
        except RunNotFound:
            self.store.create(attempt.record)
        except Superseded:
            current = self.store.records["r"]
            if current.attempt >= attempt.record.attempt:
                raise
            self.store.put_newer(attempt.record)
        return self.store.update("r", change, attempt=attempt.record.attempt)

    @rule(data=st.data())
    @precondition(lambda self: self.holding())
    def end(self, data: st.DataObject) -> None:
        """A process that has come to its end publishes; one that was asked to stop has saved."""
        worker = data.draw(st.sampled_from(self.holding()))
        attempt = self.attempts[worker]
        asked = self.store.records["r"].stop_requested if "r" in self.store.records else ""
        if attempt.step < LAST_STEP and not asked:
            return
        del self.attempts[worker]
        try:
            with self.fence.held(attempt.record.attempt):
                self.saves.append((attempt.record.attempt, attempt.step))
                if attempt.step == LAST_STEP:
                    self.published.append((attempt.record.run_id, attempt.step))
            done = attempt.step == LAST_STEP
            mirror(self.volume, self.write(attempt, lambda r: machine.finish(r, 1) if done else machine.stopped(r)))
        except Conflict:
            pass
        self.store.release_lease("r", attempt.token)

    @rule(data=st.data(), failure=st.sampled_from([Failure.PREEMPTED, Failure.PROCESS_LOST, Failure.VOLUME]))
    @precondition(lambda self: self.holding())
    def stop_attempt(self, data: st.DataObject, failure: Failure) -> None:
        """A drain, a killed process, a full volume: the supervisor says so and lets go."""
        worker = data.draw(st.sampled_from(self.holding()))
        attempt = self.attempts.pop(worker)
        try:
            after = self.write(attempt, lambda record: machine.requeue(record, "why", failure))
            mirror(self.volume, after)
            store: Any = self.store
            wake_again(after, store, self.store.send)
        except Conflict:
            pass
        self.store.release_lease("r", attempt.token)

    @rule(data=st.data())
    @precondition(lambda self: self.attempts)
    def die(self, data: st.DataObject) -> None:
        """SIGKILL of a whole worker: nothing is said, the lease stays until it lapses."""
        del self.attempts[data.draw(st.sampled_from(sorted(self.attempts)))]

    @rule(data=st.data())
    @precondition(lambda self: self.holding())
    def freeze(self, data: st.DataObject) -> None:
        self.attempts[data.draw(st.sampled_from(self.holding()))].is_frozen = True

    @rule(data=st.data())
    @precondition(lambda self: self.holding(frozen=True))
    def thaw(self, data: st.DataObject) -> None:
        """SIGCONT: its process was about to save, and does so before its supervisor looks at the lease."""
        worker = data.draw(st.sampled_from(self.holding(frozen=True)))
        self.attempts[worker].is_frozen = False
        self.come_further(worker, does_save=True)

    @rule(worker=st.sampled_from(WORKERS))
    @precondition(lambda self: self.holding())
    def take_over(self, worker: str) -> None:
        """A worker is frozen for longer than its lease, and another takes the run: rare if left to chance."""
        self.attempts[self.holding()[0]].is_frozen = True
        for _ in range(4):
            self.store.now += 3.0
            self.reaper.sweep()
        if self.store.queue and worker not in self.attempts:
            self.deliver(worker, is_repeated=False)
            if worker in self.attempts:
                self.come_further(worker, does_save=True)

    # What happens around them.

    @rule(seconds=st.floats(0.2, 8.0))
    def wait(self, seconds: float) -> None:
        self.store.now += seconds

    @rule()
    def sweep(self) -> None:
        self.reaper.sweep()

    @rule()
    def lose_messages(self) -> None:
        self.store.queue.clear()

    @rule()
    def lose_broker(self) -> None:
        """Redis comes back empty."""
        self.store.forget()

    @rule()
    def roll_broker_back(self) -> None:
        """Redis was killed and comes back a little older: as the record was when it was submitted."""
        if "r" in self.store.records:
            self.store.records["r"] = queued_record("r", max_failures=1000)
        self.store.leases.clear()
        self.store.restart()

    @rule()
    def jump(self) -> None:
        """Redis' clock steps: every lease lapses at once."""
        self.store.leases.clear()

    @rule(wish=st.sampled_from(["cancel", "pause", "resume"]))
    def ask(self, wish: str) -> None:
        if "r" not in self.store.records:
            return
        changes = {"cancel": machine.request_cancel, "pause": machine.request_pause, "resume": machine.resume}
        try:
            after = self.store.update("r", changes[wish])
        except Conflict:
            return
        mirror(self.volume, after)
        if wish == "resume":
            self.store.send(after)

    # What must hold.

    @invariant()
    def saves_are_fenced(self) -> None:
        """Once an attempt has written, none before it ever does."""
        writers = [attempt for attempt, _ in self.saves]
        assert writers == sorted(writers)

    @invariant()
    def one_checkpoint_is_published(self) -> None:
        """It may be published again, after a broker forgot the end: the registry knows it already."""
        assert len(set(self.published)) <= 1

    @invariant()
    def one_attempt_may_write(self) -> None:
        numbers = [attempt.record.attempt for attempt in self.attempts.values()]
        assert len(numbers) == len(set(numbers))
        assert sum(number >= self.fence.number() for number in numbers) <= 1

    @invariant()
    def the_volume_is_never_older_than_what_was_published(self) -> None:
        record = read_mirror(self.volume.run("r"))
        assert record is not None
        if record.state is State.SUCCEEDED:
            assert self.published


def test_left_alone_after_any_disturbance_a_run_finishes() -> None:
    """Whatever was done to it, a run that nobody stopped succeeds when the disturbances end."""
    protocol = Protocol()
    try:
        protocol.deliver("a", is_repeated=True)
        for disturb in (protocol.lose_messages, protocol.jump, protocol.lose_broker, protocol.roll_broker_back):
            disturb()
            protocol.attempts.clear()
            protocol.sweep()
        for _ in range(200):
            protocol.store.now += 1.0
            protocol.sweep()
            if protocol.store.queue and not protocol.attempts:
                protocol.deliver("b", is_repeated=False)
            for attempt in list(protocol.attempts.values()):
                assert protocol.store.renew_lease("r", attempt.token, LEASE_S)
                attempt.step = LAST_STEP
                done = protocol.write(attempt, lambda record: machine.finish(record, 1))
                protocol.attempts.clear()
                assert done.state is State.SUCCEEDED
                return
        raise AssertionError("nobody took the run up again")
    finally:
        protocol.teardown()


Protocol.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestProtocol = Protocol.TestCase
