"""What of a device's queue runs next: plain state, without threads, and with the clock handed in.

Jobs of a lane are cut and joined to batches by images. The urgent go first; among equally urgent lanes the one that
has had the least time on the device; within a lane and a priority, in order. A device may have several workers: of a
lane whose batches may run beside each other, each takes one, and none waits for another's end. Whatever else runs has
the device to itself, and so have a few images on an idle device, which are answered sooner by all of it.
"""

from services.inference.backlog import Backlog
from services.inference.lanes import PROMOTE_AFTER_S, Batch, Job, Lane, Part, Priority, Turn

# Large enough for the best throughput that eager torch has on a CPU, small enough to let others in.
MAX_BATCH = 32
# How long an idle device waits for images that are on their way (being decoded) to share a batch with.
MAX_DELAY_S = 0.005
# How much longer than estimated an answer is expected to take: what is in time by a hair is late when it arrives, and a
# full queue would then be full of such. At three times the capacity that left 0.08 of the answers in time.
MARGIN = 1.2


class BatchQueue:
    """The lanes of one device, and what its workers run; `backlog` has both, and how long they will take."""

    def __init__(
        self,
        max_batch: int = MAX_BATCH,
        max_delay_s: float = MAX_DELAY_S,
        promote_after_s: float = PROMOTE_AFTER_S,
        num_workers: int = 1,
    ) -> None:
        self.backlog = Backlog(max_batch, num_workers)
        self._max_delay_s = max_delay_s
        self._promote_after_s = promote_after_s
        self._level_s = 0.0

    @property
    def is_empty(self) -> bool:
        """True if nothing waits."""
        return not self.backlog.active

    @property
    def num_waiting(self) -> int:
        """Items that wait, in all lanes."""
        return sum(sum(lane.num_waiting) for lane in self.backlog.active)

    def submit(self, job: Job, now: float) -> bool:
        """Put `job` at the end of its lane; return whether a worker that waits should look."""
        job.queued_at, job.waits = now, True
        lane = job.lane
        lane.waiting[job.priority][job] = None
        lane.num_waiting[job.priority] += job.num_items
        if lane not in self.backlog.active:
            lane.used_s = max(lane.used_s, self._level_s)
            self.backlog.active[lane] = None
            # If only to see how long it is to wait.
            return self.backlog.num_idle > 0
        return self.backlog.num_idle > 0 and self._ready_at(lane) <= now

    def cancel(self, job: Job) -> None:
        """Forget `job`, if it has not ended; what runs of it ends by itself."""
        job.ended = True
        self._leave(job)

    def next_turn(self, now: float) -> Turn:
        """Return what to do now, for a worker that is free."""
        turn = Turn()
        while self.backlog.num_idle and (lane := self._choose(now, turn)) is not None:
            head = self._head(lane, now, turn)
            if head is None:
                continue
            alone = self._runs_alone(head)
            if not alone or not self.backlog.running:
                turn.due_at = None
                turn.batch = Batch(lane, self._fill(head, alone, now, turn), now, alone)
                self.backlog.running.append(turn.batch)
            elif head.deadline is not None:
                # The others end first, and until then nothing as urgent overtakes it; unless it is late by then.
                turn.due_at = min(head.deadline, turn.due_at or head.deadline)
            break
        return turn

    def finish(self, batch: Batch, now: float, failed: bool = False) -> list[Job]:
        """Count `batch` as done; return the jobs that ended with it: each that is complete, or all if it failed."""
        self.backlog.running.remove(batch)
        duration_s = now - batch.started_at
        share_s = duration_s if batch.alone else duration_s / self.backlog.num_workers
        if not failed:
            batch.lane.fit.add(batch.num_items, share_s, now)
            batch.lane.statistics.ran(batch.num_items, duration_s)
        batch.lane.used_s += share_s
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
        jobs = [job for lane in self.backlog.active for waiting in lane.waiting for job in waiting]
        for job in jobs:
            self.cancel(job)
        return jobs

    def _urgency(self, job: Job, now: float) -> int:
        return max(0, job.priority - int((now - job.queued_at) / self._promote_after_s))

    def _choose(self, now: float, turn: Turn) -> Lane | None:
        """Return the lane whose turn it is, of those that need not wait for more; note in `turn` when one is due."""
        best: tuple[int, float] | None = None
        chosen = None
        for lane in self.backlog.active:
            ready_at = self._ready_at(lane)
            if ready_at > now:
                turn.due_at = ready_at if turn.due_at is None else min(turn.due_at, ready_at)
                continue
            key = min(self._urgency(job, now) for job in lane.heads()), lane.used_s
            if best is None or key < best:
                best, chosen = key, lane
        return chosen

    def _ready_at(self, lane: Lane) -> float:
        """Return since or from when `lane` need not wait: enough for a batch, or its oldest has waited for long."""
        heads = list(lane.heads())
        oldest = min(job.queued_at for job in heads)
        if any(job.kind is None for job in heads) or sum(lane.num_waiting) >= self._enough(lane, oldest):
            return oldest
        # So that none is late by waiting, nor by a hair.
        in_time = (self._last_moment(job) - self._max_delay_s for job in heads if job.deadline is not None)
        return min([oldest + self._max_delay_s, *in_time])

    def _enough(self, lane: Lane, oldest: float) -> int:
        """Return for how many items `lane` begins a batch at once."""
        beside = [batch for batch in self.backlog.running if batch.lane.beside_from] if lane.beside_from else []
        if any(batch.lane is lane and oldest <= batch.started_at for batch in beside):
            # What was cut: the other workers take the rest of it.
            return 1
        if lane.num_announced:
            return self.backlog.most(lane)
        if beside and not lane.waiting[Priority.HIGH]:
            # The device is not idle: a better batch is worth waiting for. Alone an image takes 1.6 times as much of it.
            return self.backlog.most(lane) // 2
        return 1

    def _last_moment(self, job: Job) -> float:
        assert job.deadline is not None
        num_items = max(job.num_items - job.num_taken, job.lane.as_urgent(job.priority))
        num_items = min(num_items, self.backlog.most(job.lane))
        return job.deadline - MARGIN * self.backlog.span_s(job.lane, num_items, alone=False)

    def _runs_alone(self, head: Job) -> bool:
        """Return whether the batch that begins with `head` has the device to itself."""
        lane = head.lane
        if head.kind is None or not lane.beside_from:
            return not head.beside
        return not self.backlog.running and sum(lane.num_waiting) < lane.beside_from

    def _head(self, lane: Lane, now: float, turn: Turn) -> Job | None:
        """Return the job of `lane` that is next; those whose time has run out leave for `turn`."""
        while (job := self._most_urgent(lane, now)) is not None:
            alone = self._runs_alone(job)
            if not self._is_late(job, now, 0, self._room(lane, alone), alone):
                return job
            self._drop_late(job, turn)
        return None

    def _room(self, lane: Lane, alone: bool) -> int:
        """Return how many items the next batch of `lane` may have: free workers share what waits."""
        most = self.backlog.most(lane, alone)
        return most if alone else min(most, -(-sum(lane.num_waiting) // self.backlog.num_idle))

    def _fill(self, head: Job, alone: bool, now: float, turn: Turn) -> tuple[Part, ...]:
        """Take a batch from the lane of `head`: this first, joined by those of its kind."""
        lane = head.lane
        self._level_s = max(self._level_s, lane.used_s)
        size = self._room(lane, alone)
        parts = [self._take(head, size)]
        num_taken = parts[0].end - parts[0].first
        while head.kind is not None and not parts[-1].job.waits and num_taken < size:
            job = self._most_urgent(lane, now)
            if job is None:
                break
            if self._is_late(job, now, num_taken, size, alone):
                self._drop_late(job, turn)
                continue
            num_items = min(size, num_taken + job.num_items - job.num_taken)
            if not self._may_join(job, parts, now + self.backlog.span_s(lane, num_items, alone, now)):
                break
            parts.append(self._take(job, size - num_taken))
            num_taken += parts[-1].end - parts[-1].first
        return tuple(parts)

    def _drop_late(self, job: Job, turn: Turn) -> None:
        self.cancel(job)
        turn.late.append(job)

    def _is_late(self, job: Job, now: float, num_taken: int, size: int, alone: bool) -> bool:
        """Return whether the answer to `job` would come after its deadline, even in the batch of `size` made now."""
        if job.deadline is None:
            return False
        if now >= job.deadline or not job.whole:
            return now >= job.deadline
        lane = job.lane
        num_left = job.num_items - job.num_taken
        num_items = max(num_left, num_taken + lane.as_urgent(job.priority))
        if num_left <= self.backlog.max_batch:
            # Of those it shares a batch with, no more than fit; a larger job lets the others in between.
            num_items = min(num_items, max(num_left, size))
        return now + MARGIN * self.backlog.span_s(lane, num_items, alone, now) > job.deadline

    def _may_join(self, job: Job, parts: list[Part], ends_at: float) -> bool:
        """Return whether `job` may share a batch with `parts` that ends then: of one kind, no urgent one late."""
        if job.kind is None or job.kind != parts[0].job.kind:
            return False
        urgent = (part.job.deadline for part in parts if part.job.priority < job.priority)
        return all(deadline is None or ends_at <= deadline for deadline in urgent)

    def _most_urgent(self, lane: Lane, now: float) -> Job | None:
        return min(lane.heads(), key=lambda job: (self._urgency(job, now), job.queued_at), default=None)

    def _take(self, job: Job, room: int) -> Part:
        first, end = job.num_taken, min(job.num_taken + room, job.num_items)
        job.num_taken = end
        lane, jobs = job.lane, job.lane.waiting[job.priority]
        lane.num_waiting[job.priority] -= end - first
        if end == job.num_items:
            jobs.pop(job)
            job.waits = False
            self._retire(lane)
        elif job.num_items - end > self.backlog.max_batch:
            # With more than a batch to go it lets the others in between.
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
            self.backlog.active.pop(lane, None)
