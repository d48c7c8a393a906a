"""What waits for a device, and what runs next: plain state, without threads, and with the clock handed in.

A lane holds what waits for one model. Its jobs are cut and joined to batches by images. The urgent go first; among
equally urgent lanes the one that has had the least time on the device; within a lane and a priority, in order.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from services.inference.estimates import DurationFit
from services.inference.statistics import ModelStatistics

# Large enough for the best throughput that eager torch has on a CPU, small enough to let others in.
MAX_BATCH = 32
# How long an idle device waits for images that are on their way (being decoded) to share a batch with.
MAX_DELAY_S = 0.005
# How much longer than estimated an answer is expected to take: what is in time by a hair is late when it arrives, and a
# full queue would then be full of such. At three times the capacity that left 0.08 of the answers in time.
MARGIN = 1.2
# After so long in the queue a job counts as one priority higher, so that the urgent never starve the rest.
PROMOTE_AFTER_S = 2.0


class Priority(IntEnum):
    """Who goes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(eq=False, slots=True)
class Lane:
    """What waits for one model, and what is known of its batches."""

    fit: DurationFit = field(default_factory=DurationFit)
    waiting: tuple[OrderedDict["Job", None], ...] = field(
        default_factory=lambda: tuple(OrderedDict[Job, None]() for _ in Priority)
    )
    # Items in `waiting` by priority, less those already in a batch.
    num_waiting: list[int] = field(default_factory=lambda: [0] * len(Priority))
    # Items whose callers hold a place, from admission to answer.
    num_admitted: int = 0
    # Calls on their way here: admitted, not yet in the queue.
    num_announced: int = 0
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    # Seconds on the device; a lane that was empty starts level with the others.
    used_s: float = 0.0

    @property
    def num_jobs(self) -> int:
        """Jobs in `waiting`."""
        return sum(len(jobs) for jobs in self.waiting)

    def heads(self) -> Iterator["Job"]:
        """Yield the first job of each priority that has one."""
        for jobs in self.waiting:
            if jobs:
                yield next(iter(jobs))


@dataclass(eq=False, slots=True)
class Job:
    """`num_items` items (images, or one piece of other work) of a caller, in order of arrival.

    Jobs of one `kind` may share a batch; those of None run alone. `deadline` is a time of the clock handed in.
    """

    lane: Lane
    num_items: int
    payload: Any = None
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    kind: Hashable = None
    # Of use only if all of it is done by its deadline; a turn of a text is of use as far as it goes.
    whole: bool = True
    queued_at: float = 0.0
    num_taken: int = 0
    num_done: int = 0
    # In its lane's queue; a job that ended another way is nowhere.
    waits: bool = False
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """Items `first` to `end` (excluded) of a job."""

    job: Job
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What runs at once."""

    lane: Lane
    parts: tuple[Part, ...]
    started_at: float

    @property
    def num_items(self) -> int:
        """Items in all."""
        return sum(part.end - part.first for part in self.parts)


@dataclass(slots=True)
class Turn:
    """What is to be done now: jobs whose time has run out, and a batch; without one, when to look again (None: at the
    next change)."""

    late: list[Job] = field(default_factory=list)
    batch: Batch | None = None
    due_at: float | None = None


class BatchQueue:
    """The lanes of one device, and what runs on it."""

    def __init__(
        self, max_batch: int = MAX_BATCH, max_delay_s: float = MAX_DELAY_S, promote_after_s: float = PROMOTE_AFTER_S
    ) -> None:
        self.max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._promote_after_s = promote_after_s
        # In order of their last filling; emptied lanes leave.
        self._active: OrderedDict[Lane, None] = OrderedDict()
        self._running: Batch | None = None
        self._level_s = 0.0

    @property
    def is_empty(self) -> bool:
        """True if nothing waits."""
        return not self._active

    @property
    def num_waiting(self) -> int:
        """Items that wait, in all lanes."""
        return sum(sum(lane.num_waiting) for lane in self._active)

    def submit(self, job: Job, now: float) -> None:
        """Put `job` at the end of its lane."""
        job.queued_at, job.waits = now, True
        lane = job.lane
        lane.waiting[job.priority][job] = None
        lane.num_waiting[job.priority] += job.num_items
        if lane not in self._active:
            lane.used_s = max(lane.used_s, self._level_s)
            self._active[lane] = None

    def cancel(self, job: Job) -> None:
        """Forget `job`, if it has not ended; what runs of it ends by itself."""
        job.ended = True
        self._leave(job)

    def next_turn(self, now: float) -> Turn:
        """Return what to do now that the device is free."""
        turn = Turn()
        while (lane := self._choose(now, turn)) is not None:
            parts = self._fill(lane, now, turn)
            if parts:
                turn.batch = self._running = Batch(lane, parts, now)
                turn.due_at = None
                break
        return turn

    def finish(self, batch: Batch, now: float, failed: bool = False) -> list[Job]:
        """Count `batch` as done; return the jobs that ended with it: each that is complete, or all if it failed."""
        self._running = None
        duration_s = now - batch.started_at
        if not failed:
            batch.lane.fit.add(batch.num_items, duration_s, now)
            batch.lane.statistics.ran(batch.num_items, duration_s)
        batch.lane.used_s += duration_s
        ended = []
        for part in batch.parts:
            job = part.job
            job.num_done += part.end - part.first
            if not job.ended and (failed or job.num_done == job.num_items):
                job.ended = True
                self._leave(job)
                ended.append(job)
        return ended

    def drain(self) -> list[Job]:
        """End all that waits, and return it."""
        jobs = [job for lane in self._active for waiting in lane.waiting for job in waiting]
        for job in jobs:
            self.cancel(job)
        return jobs

    def wait_s(self, lane: Lane, num_items: int, priority: Priority, now: float) -> float:
        """Return the estimate of how long `num_items` more of `lane` would take from now to their answer.

        What has been let in and is still on its way here, being decoded, is ahead of them.
        """
        # Where others wait, batches will soon confirm the estimate or mend it; an idle model is tried now and then.
        seen_by = None if any(lane.waiting) else now
        own = lane.fit.duration_s(num_items, seen_by, self.max_batch)
        num_ahead = _as_urgent(lane, priority) + self._num_coming(lane)
        ahead = lane.fit.duration_s(num_ahead, seen_by, self.max_batch) + own
        # Lanes share the device: while this one is served for so long, no other gets more than that.
        others = sum(
            min(ahead, other.fit.duration_s(_as_urgent(other, priority), None, self.max_batch))
            for other in self._active
            if other is not lane
        )
        return self._rest_s(now) + ahead + others

    def share_s(self, lane: Lane, num_items: int) -> float:
        """Return what `num_items` of `lane` take of full batches."""
        return lane.fit.duration_s(self.max_batch, None) * num_items / self.max_batch

    def backlog_s(self, now: float) -> float:
        """Return the estimate of how long all that waits and runs will take."""
        waiting = (lane.fit.duration_s(sum(lane.num_waiting), None, self.max_batch) for lane in self._active)
        return self._rest_s(now) + sum(waiting)

    def overdue_s(self, now: float) -> float:
        """Return how much longer what runs has taken than it was expected to."""
        batch = self._running
        if batch is None:
            return 0.0
        return max(0.0, now - batch.started_at - batch.lane.fit.duration_s(batch.num_items, None))

    def _num_coming(self, lane: Lane) -> int:
        """Return how many items of `lane` hold a place, but neither wait nor run."""
        batch = self._running
        num_running = batch.num_items if batch is not None and batch.lane is lane else 0
        return max(0, lane.num_admitted - sum(lane.num_waiting) - num_running)

    def _rest_s(self, now: float) -> float:
        batch = self._running
        if batch is None:
            return 0.0
        return max(0.0, batch.started_at + batch.lane.fit.duration_s(batch.num_items, None) - now)

    def _urgency(self, job: Job, now: float) -> int:
        return max(0, job.priority - int((now - job.queued_at) / self._promote_after_s))

    def _choose(self, now: float, turn: Turn) -> Lane | None:
        """Return the lane whose turn it is, of those that need not wait for more; note in `turn` when one is due."""
        best: tuple[int, float] | None = None
        chosen = None
        for lane in self._active:
            ready_at = self._ready_at(lane)
            if ready_at > now:
                turn.due_at = ready_at if turn.due_at is None else min(turn.due_at, ready_at)
                continue
            key = min(self._urgency(job, now) for job in lane.heads()), lane.used_s
            if best is None or key < best:
                best, chosen = key, lane
        return chosen

    def _ready_at(self, lane: Lane) -> float:
        """Return since or from when `lane` need not wait: full, nothing on its way, or its oldest has waited enough."""
        oldest = min(job.queued_at for job in lane.heads())
        full = sum(lane.num_waiting) >= self.max_batch
        alone = any(job.kind is None for job in lane.heads())
        return oldest if full or alone or not lane.num_announced else oldest + self._max_delay_s

    def _fill(self, lane: Lane, now: float, turn: Turn) -> tuple[Part, ...]:
        """Take a batch from `lane`: the most urgent first, joined by those of its kind."""
        self._level_s = max(self._level_s, lane.used_s)
        parts: list[Part] = []
        room = self.max_batch
        while room and (job := self._most_urgent(lane, now)) is not None:
            if self._is_late(job, now, self.max_batch - room):
                self.cancel(job)
                turn.late.append(job)
                continue
            if parts and not self._may_join(job, parts, now, self.max_batch - room):
                break
            part = self._take(job, room)
            parts.append(part)
            room -= part.end - part.first
            if job.kind is None or job.waits:
                break
        return tuple(parts)

    def _is_late(self, job: Job, now: float, num_taken: int) -> bool:
        """Return whether the answer to `job` would come after its deadline, even in the batch that is made now."""
        if job.deadline is None:
            return False
        if now >= job.deadline or not job.whole:
            return now >= job.deadline
        num_items = max(job.num_items - job.num_taken, num_taken + _as_urgent(job.lane, job.priority))
        if job.num_items - job.num_taken <= self.max_batch:
            num_items = min(num_items, self.max_batch)
        return now + MARGIN * job.lane.fit.duration_s(num_items, now, self.max_batch) > job.deadline

    def _may_join(self, job: Job, parts: list[Part], now: float, num_taken: int) -> bool:
        """Return whether `job` fits in with `parts`: of their kind, and no more urgent one is late by it."""
        if job.kind is None or job.kind != parts[0].job.kind:
            return False
        num_items = min(self.max_batch, num_taken + job.num_items - job.num_taken)
        ends_at = now + job.lane.fit.duration_s(num_items, now)
        urgent = (part.job.deadline for part in parts if part.job.priority < job.priority)
        return all(deadline is None or ends_at <= deadline for deadline in urgent)

    def _most_urgent(self, lane: Lane, now: float) -> Job | None:
        return min(lane.heads(), key=lambda job: (self._urgency(job, now), job.queued_at), default=None)

    def _take(self, job: Job, room: int) -> Part:
        first, end = job.num_taken, min(job.num_taken + room, job.num_items)
        job.num_taken = end
        lane, jobs = job.lane, job.lane.waiting[job.priority]
        if end == job.num_items:
            lane.num_waiting[job.priority] -= end - first
            jobs.pop(job)
            job.waits = False
            self._retire(lane)
        else:
            lane.num_waiting[job.priority] -= end - first
            # With more than a batch to go it lets the others in between.
            if job.num_items - end > self.max_batch:
                jobs.move_to_end(job)
        return Part(job, first, end)

    def _leave(self, job: Job) -> None:
        if job.waits:
            job.waits = False
            job.lane.waiting[job.priority].pop(job)
            job.lane.num_waiting[job.priority] -= job.num_items - job.num_taken
            self._retire(job.lane)

    def _retire(self, lane: Lane) -> None:
        if not any(lane.waiting):
            self._active.pop(lane, None)


def _as_urgent(lane: Lane, priority: Priority) -> int:
    return sum(lane.num_waiting[: priority + 1])
