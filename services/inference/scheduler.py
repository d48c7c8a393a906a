"""One queue for each device, and its workers: all work on a device passes through here, in turn.

`admit` bounds what is in the server and refuses what can't be answered in time; `predict` puts images in the queue of
their model, where calls share batches and large ones are cut; `run` takes any other work, which its callers cut. What
waits, and what runs next, is plain state in `batching`; here are the threads, the event loops and the clock. A call
costs one wake-up of a worker at most, and the calls of a batch one wake-up of their event loop together.

A GPU has one worker. A CPU has as many as its runtimes have streams: batches then run beside each other on different
cores, and none waits for another. With two halves of each batch that began together, the core which the event loop was
not on idled for a quarter of the time.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from services.inference.admission import Limits, Load, Room
from services.inference.batching import MARGIN, MAX_BATCH, MAX_DELAY_S, BatchQueue
from services.inference.calls import Call, Done, Order, answer, compute, fail
from services.inference.lanes import Batch, Job, Lane, Priority, Turn
from services.inference.niceness import give_way
from services.inference.place import Place, Predicts
from services.inference.statistics import ModelStatistics, Passage
from tandem.errors import DeadlineExceeded, QueueFull, Unavailable
from tandem.wire.limits import MAX_QUEUE_ITEMS

__all__ = ["MAX_BATCH", "DeviceScheduler", "Done", "Place", "Predicts", "Priority"]

log = logging.getLogger("tandem.inference.scheduler")

T = TypeVar("T")


class DeviceScheduler:
    """Runs work on `device` one batch at a time; `admit` bounds what waits."""

    def __init__(
        self,
        device: torch.device,
        max_items: int = MAX_QUEUE_ITEMS,
        limits: Limits | None = None,
        max_batch: int = MAX_BATCH,
        max_delay_s: float = MAX_DELAY_S,
        num_workers: int = 1,
    ) -> None:
        self.device = device
        self._room = Room(limits or Limits(items=max_items))
        self._queue = BatchQueue(max_batch, max_delay_s, num_workers=num_workers)
        self._backlog = self._queue.backlog
        # A lane lives as long as its runtime does: what is known of it goes with it.
        self._lanes: WeakKeyDictionary[Any, Lane] = WeakKeyDictionary()
        self._other = Lane()
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        # Seconds of the device that calls have asked for, let in or not, as far as can be told.
        self.asked_s = 0.0
        names = [f"device-{device}" + (f"-{number}" if number else "") for number in range(num_workers)]
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    @property
    def num_items(self) -> int:
        """Items that calls hold room for."""
        return self._room.num_items

    @property
    def num_bytes(self) -> int:
        """Bytes of the requests of those calls."""
        return self._room.num_bytes

    @property
    def num_streams(self) -> int:
        """Streams of texts that are open."""
        return self._room.num_streams

    @property
    def num_waiting(self) -> int:
        """Items in the queue that have not begun."""
        with self._changed:
            return self._queue.num_waiting

    @property
    def is_alive(self) -> bool:
        """False once it is closed, or its thread has failed: then it refuses what comes."""
        return not self._closed

    def ahead_s(self, runtimes: Sequence[object], priority: Priority) -> float:
        """Return the estimate of how long what is there, or on its way, keeps a call of `runtimes` waiting."""
        now = time.monotonic()
        with self._changed:
            num_coming = max(0, self._room.num_items - self._queue.num_waiting)
            lanes = [self._lane(runtime) for runtime in runtimes]
            waits = (self._backlog.wait_s(lane, num_coming, priority, now) for lane in lanes)
            # What takes longer than expected is expected to go on for as long: a stuck device draws no calls.
            return max(waits, default=0.0) + self._backlog.overdue_s(now)

    def is_busy(self, runtime: object) -> bool:
        """Return whether calls hold room for `runtime`."""
        with self._changed:
            lane = self._lanes.get(runtime)
            return lane is not None and lane.num_admitted > 0

    @contextmanager
    def admit(
        self,
        num_items: int,
        *runtimes: object,
        num_bytes: int = 0,
        deadline: float | None = None,
        priority: Priority = Priority.NORMAL,
        joins: bool = False,
        stream: bool = False,
    ) -> Iterator[Place]:
        """Hold room for `num_items` items for each of `runtimes`; `joins` says that their images may share batches.

        Raises QueueFull if there is no room, and DeadlineExceeded if the answer is not to be had by `deadline` (a
        time.monotonic() value), as far as the batches of late tell; a stream is of use before it is whole. A request
        on its own is always let in, whatever its size, which has its own limits.
        """
        place = self._enter(num_items, runtimes, num_bytes, deadline, priority, joins, stream)
        failure: BaseException | None = None
        try:
            yield place
        except BaseException as error:
            failure = error
            raise
        finally:
            with self._changed:
                self._room.leave(place.load)
                self._arrived(place)
                place.passage.end(place.load.num_items, failure, deadline)

    def statistics(self, runtime: object) -> ModelStatistics:
        """Return what was done with `runtime` so far."""
        with self._changed:
            return self._lane(runtime).statistics.copy()

    def pending(self, *runtimes: object) -> tuple[int, int]:
        """Return how many jobs and items of `runtimes` wait for the device."""
        with self._changed:
            lanes = [self._lanes[runtime] for runtime in runtimes if runtime in self._lanes]
            return sum(lane.num_jobs for lane in lanes), sum(sum(lane.num_waiting) for lane in lanes)

    def refusals(self) -> dict[str, int]:
        """Return how many calls were not let in or were late in the queue, by the reason."""
        with self._changed:
            return dict(self._room.refusals)

    def refuse(self, reason: str) -> None:
        """Count a call that was refused before it came here, for one of `admission.REASONS`."""
        with self._changed:
            self._room.refuse(reason)

    def begin_statistics(self, *runtimes: object, label: str = "") -> None:
        """Count anew, and together, what is done with `runtimes`, which are those of one model, known as `label`."""
        statistics = ModelStatistics(label=label)
        with self._changed:
            for runtime in runtimes:
                self._lane(runtime).statistics = statistics

    async def run(
        self,
        work: Callable[[], T],
        deadline: float | None = None,
        priority: Priority = Priority.NORMAL,
        runtime: object = None,
        beside: bool = False,
    ) -> Done[T]:
        """Run `work` on a worker in its turn, with the device to itself, or `beside` what others run.

        `deadline` is a time.monotonic() value. Its time counts as that of `runtime`, if one is given. Raises
        DeadlineExceeded if the turn comes too late, Unavailable if the scheduler is closed before, and what `work`
        raises. Cancelled, it gives up its turn; work that has begun ends by itself.
        """
        return await self._await(work, None, runtime, Order(deadline, priority, beside=beside), None)

    async def predict(
        self,
        runtime: Predicts,
        pixels: Tensor,
        deadline: float | None = None,
        priority: Priority = Priority.NORMAL,
        joins: bool = False,
    ) -> Done[Tensor]:
        """Return logits (N, C) for pixels (N, 3, S, S) of any N ≥ 1, computed in batches that others may share if it
        `joins`, else cut by themselves from the first image on. Raises what `run` does."""
        return await self.await_images(runtime, pixels, Order(deadline, priority, joins))

    async def await_images(
        self, runtime: Predicts, pixels: Tensor, order: Order, place: Place | None = None
    ) -> Done[Any]:
        """Return the answer to `order`: the logits of `pixels`, or their best classes."""
        return await self._await(runtime.predict, pixels, runtime, order, place)

    @property
    def is_wanted(self) -> bool:
        """True if work waits for the device, besides what runs."""
        with self._changed:
            return not self._queue.is_empty

    def close(self) -> None:
        """Finish the batches that run, fail what waits with Unavailable, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        gives_up_at = time.monotonic() + 5
        for thread in self._threads:
            thread.join(timeout=max(0.0, gives_up_at - time.monotonic()))

    def _enter(
        self,
        num_items: int,
        runtimes: Sequence[object],
        num_bytes: int,
        deadline: float | None,
        priority: Priority,
        joins: bool,
        stream: bool,
    ) -> Place:
        now = time.monotonic()
        with self._changed:
            self.asked_s += sum(self._backlog.share_s(self._lane(runtime), num_items) for runtime in runtimes)
            load = Load(num_items, [self._lane(runtime) for runtime in runtimes], num_bytes, stream)
            statistics = [lane.statistics for lane in load.lanes]
            try:
                self._check_in_time(load, deadline, priority, joins, now)
                self._room.enter(load, self._backlog.all_s(now))
            except (QueueFull, DeadlineExceeded) as error:
                Passage(statistics).end(0, error)
                raise
            place = Place(self, load, deadline, priority, joins, Passage(statistics))
            for lane in load.lanes if joins else ():
                lane.num_announced += 1
        return place

    def _check_in_time(self, load: Load, deadline: float | None, priority: Priority, joins: bool, now: float) -> None:
        if deadline is None or load.stream:
            return
        waits = (self._backlog.wait_s(lane, load.num_items, priority, now, joins) for lane in load.lanes)
        wait_s = max(waits, default=0.0)
        if wait_s and now + MARGIN * wait_s > deadline:
            self._room.refuse("deadline")
            raise _refused(wait_s, deadline - now)

    def _arrived(self, place: Place) -> None:
        """Note, with the lock held, that nothing more of `place` is on its way to be joined."""
        if place.announced:
            place.announced = False
            for lane in place.load.lanes:
                lane.num_announced -= 1
                if not lane.num_announced and any(lane.waiting):
                    self._wake_one()

    def _lane(self, runtime: object) -> Lane:
        if runtime is None:
            return self._other
        # Not by setdefault: a lane that is made to be thrown away was a tenth of what a call costs the event loop.
        if (lane := self._lanes.get(runtime)) is None:
            lane = self._lanes[runtime] = Lane(beside_from=getattr(runtime, "beside_from", 0))
        return lane

    def _wake_one(self) -> None:
        """Wake a worker, with the lock held, if one may begin something; whoever ends a batch looks by itself."""
        if self._backlog.num_idle:
            self._changed.notify()

    async def _await(
        self, work: Callable[..., Any], pixels: Tensor | None, runtime: object, order: Order, place: Place | None
    ) -> Done[Any]:
        loop = asyncio.get_running_loop()
        beside = getattr(runtime, "predict_beside", None)
        call = Call(work, pixels, loop.create_future(), loop, order.top_k, beside)
        num_items = 1 if pixels is None else pixels.shape[0]
        kind = tuple(pixels.shape[1:]) if order.joins and pixels is not None else None
        with self._changed:
            if self._closed:
                raise _stopping()
            lane = self._lane(runtime)
            job = Job(lane, num_items, call, order.priority, order.deadline, kind, pixels is not None, order.beside)
            is_due = self._queue.submit(job, time.monotonic())
            if place is not None:
                self._arrived(place)
            if is_due:
                self._changed.notify()
        try:
            return await call.future
        except asyncio.CancelledError:
            with self._changed:
                self._queue.cancel(job)
                # It may have been what the others waited behind.
                if not self._queue.is_empty:
                    self._wake_one()
            raise

    def _serve(self) -> None:
        if self.device.type == "cpu":
            give_way()
        # Each thread has its own setting. Two at the least: with one, torch chooses other kernels for small batches
        # than for large ones, and the same image would get other roundings (see runtimes.eager).
        torch.set_num_threads(max(2, torch.get_num_threads()))
        batch: Batch | None = None
        try:
            while (batch := self._next_batch()) is not None:
                self._run(batch)
                # While nothing else comes it would keep its model in memory.
                batch = None
        except BaseException:
            log.critical("the thread of %s failed; it takes no more calls", self.device, exc_info=True)
        finally:
            # Also if the thread itself fails: nobody is to wait for it for ever.
            with self._changed:
                self._closed = True
                self._changed.notify_all()
                left = self._queue.drain()
            if batch is not None:
                left += [part.job for part in batch.parts]
            fail([job.payload for job in left], _stopping())

    def _next_batch(self) -> Batch | None:
        """Wait for what is to run next, and end what is late; return None once the scheduler is closed."""
        while True:
            with self._changed:
                turn = self._wait()
                now = time.monotonic()
                # By number: a job named here would keep its model in memory while this worker sleeps.
                for _ in range(len(turn.late) if turn is not None else 0):
                    self._room.refuse("late")
                if turn is not None and not self._queue.is_empty:
                    self._wake_one()
            if turn is None:
                return None
            _fail_late(turn.late, now)
            if turn.batch is not None:
                return turn.batch
            del turn

    def _wait(self) -> Turn | None:
        while not self._closed:
            now = time.monotonic()
            turn = self._queue.next_turn(now)
            if turn.batch is not None or turn.late:
                return turn
            self._changed.wait(None if turn.due_at is None else turn.due_at - now)
        return None

    def _run(self, batch: Batch) -> None:
        error = None
        try:
            compute(batch)
        except Exception as failure:  # noqa: BLE001 - it belongs to the callers, who get it
            error = _out_of_memory(failure) if isinstance(failure, torch.OutOfMemoryError | MemoryError) else failure
        ended_at = time.monotonic()
        with self._changed:
            for part in batch.parts:
                part.job.payload.computed.append((batch.started_at, ended_at))
            ended = self._queue.finish(batch, ended_at, failed=error is not None)
        try:
            if error is None:
                answer(ended, ended_at)
        except Exception as failure:  # noqa: BLE001 - of joining the parts of large calls; theirs too
            error = failure
        if error is not None:
            fail([job.payload for job in ended], error)
        if isinstance(error, torch.AcceleratorError):
            # Its context is lost: all that would come here would fail, and fast, which draws calls.
            raise error


def _out_of_memory(error: BaseException) -> QueueFull:
    log.warning("no memory for a batch: %s", " ".join(str(error).split())[:200])
    return QueueFull("the device has no memory for this batch now; send fewer images at a time, or try again", 1.0)


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping, or its device has failed; try again")


def _fail_late(jobs: Sequence[Job], now: float) -> None:
    for job in jobs:
        fail([job.payload], _late(job, now))


def _late(job: Job, now: float) -> DeadlineExceeded:
    if job.deadline is not None and now >= job.deadline:
        return DeadlineExceeded("the deadline passed while the request waited for the device")
    return DeadlineExceeded("the request waited for the device until its answer could no longer be in time")


def _refused(wait_s: float, remaining_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the answer would take about {wait_s * 1000:.3g} ms, and the deadline is in {remaining_s * 1000:.3g} ms: "
        "give the call more time, or try again when less waits for the device"
    )
