"""What waits for a device and runs on it, and how long that will take: plain state, with the clock handed in."""

from collections import OrderedDict

from services.inference.lanes import Batch, Lane, Priority


class Backlog:
    """The lanes that have work, and the batches that `num_workers` workers of one device run.

    Durations are seconds of the whole device: a batch on one of two workers takes twice its own from beginning to end.
    """

    def __init__(self, max_batch: int, num_workers: int = 1) -> None:
        self.max_batch = max_batch
        self.num_workers = num_workers
        # In order of their last filling; emptied lanes leave.
        self.active: OrderedDict[Lane, None] = OrderedDict()
        self.running: list[Batch] = []

    @property
    def num_idle(self) -> int:
        """Workers that may begin a batch now."""
        if any(batch.alone for batch in self.running):
            return 0
        return self.num_workers - len(self.running)

    def most(self, lane: Lane, alone: bool = False) -> int:
        """Return the size of a full batch of `lane`: where they run beside each other, the workers share one."""
        return self.max_batch if alone or not lane.beside_from else max(1, self.max_batch // self.num_workers)

    def span_s(self, lane: Lane, num_items: int, alone: bool, now: float | None = None) -> float:
        """Return the estimate of how long `num_items` take from beginning to end, in as many batches as they are.

        The last of them, if it has but one worker, takes as much longer. See DurationFit.duration_s for `now`.
        """
        most = self.most(lane, alone)
        longer_s = 0.0 if alone else (self.num_workers - 1) * lane.fit.duration_s(min(num_items, most), now)
        return lane.fit.duration_s(num_items, now, most) + longer_s

    def wait_s(self, lane: Lane, num_items: int, priority: Priority, now: float, joins: bool = True) -> float:
        """Return the estimate of how long `num_items` more of `lane` would take from now to their answer.

        What has been let in and is still on its way here, being decoded, is ahead of them. Items that do not join
        others have the device alone.
        """
        # Where others wait, batches will soon confirm the estimate or mend it; an idle model is tried now and then.
        seen_by = None if any(lane.waiting) else now
        num_ahead = lane.as_urgent(priority) + self._num_coming(lane)
        are_few = not self.running and num_ahead + num_items < lane.beside_from
        alone = are_few or not joins or not lane.beside_from
        ahead_s = lane.fit.duration_s(num_ahead, seen_by, self.most(lane))
        own_s = self.span_s(lane, num_items, alone, seen_by)
        # Lanes share the device: while this one is served for so long, no other gets more than that.
        others_s = sum(
            min(ahead_s + own_s, other.fit.duration_s(other.as_urgent(priority), None, self.most(other)))
            for other in self.active
            if other is not lane
        )
        if not alone and self.num_idle and not ahead_s and not others_s:
            return own_s
        return self._rest_s(now, alone) + ahead_s + own_s + others_s

    def share_s(self, lane: Lane, num_items: int) -> float:
        """Return what `num_items` of `lane` take of full batches."""
        most = self.most(lane)
        return lane.fit.duration_s(most, None) * num_items / most

    def all_s(self, now: float) -> float:
        """Return the estimate of how long all that waits and runs will take."""
        waiting = (lane.fit.duration_s(sum(lane.num_waiting), None, self.most(lane)) for lane in self.active)
        return self._rest_s(now, alone=False) + sum(waiting)

    def overdue_s(self, now: float) -> float:
        """Return how much longer what runs has taken than it was expected to."""
        return max((-self._left_s(batch, now) for batch in self.running if self._left_s(batch, now) < 0), default=0.0)

    def _num_coming(self, lane: Lane) -> int:
        """Return how many items of `lane` hold a place, but neither wait nor run."""
        num_running = sum(batch.num_items for batch in self.running if batch.lane is lane)
        return max(0, lane.num_admitted - sum(lane.num_waiting) - num_running)

    def _rest_s(self, now: float, alone: bool) -> float:
        """Return how long what runs holds others up: all of it what is to run alone, else its share of the device."""
        left = [(max(0.0, self._left_s(batch, now)), batch) for batch in self.running]
        if alone:
            return max((left_s for left_s, _ in left), default=0.0)
        return sum(left_s / (1 if batch.alone else self.num_workers) for left_s, batch in left)

    def _left_s(self, batch: Batch, now: float) -> float:
        """Return the estimate of how long `batch` still runs; below zero if it should have ended."""
        return batch.started_at + self.span_s(batch.lane, batch.num_items, batch.alone) - now
