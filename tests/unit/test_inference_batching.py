"""What waits for a device and what runs next, with a clock and a device of the test's own."""

import copy
import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference import batching
from services.inference.admission import Limits, Load, Room
from services.inference.batching import MARGIN, BatchQueue
from services.inference.estimates import MAX_AGE_S, DurationFit
from services.inference.lanes import Batch, Job, Lane, Part, Priority
from tandem.errors import QueueFull

MAX_BATCH, MAX_DELAY_S, PROMOTE_AFTER_S = 8, 0.01, 1.0
A_S, B_S = 0.004, 0.002


class Device:
    """Runs what the queue says on so many workers, and checks each batch; the first two lanes may run beside others."""

    def __init__(self, num_workers: int = 1, beside_from: int = 0) -> None:
        self.now = 100.0
        self.queue = BatchQueue(MAX_BATCH, MAX_DELAY_S, PROMOTE_AFTER_S, num_workers)
        self.lanes = [Lane(beside_from=beside_from), Lane(beside_from=beside_from), Lane()]
        self.jobs: list[Job] = []
        self.running: list[Batch] = []
        self.num_workers = num_workers
        self.ends: Counter[Job] = Counter()
        self.answered: list[Job] = []
        self.begun: list[Job] = []
        self._parts: defaultdict[Job, list[Part]] = defaultdict(list)

    def submit(
        self,
        lane: int,
        num_items: int = 1,
        priority: Priority = Priority.NORMAL,
        in_s: float | None = None,
        kind: object = 1,
    ) -> Job:
        deadline = None if in_s is None else self.now + in_s
        job = Job(self.lanes[lane], num_items, len(self.jobs), priority, deadline, kind)
        self.jobs.append(job)
        self.queue.submit(job, self.now)
        return job

    def cancel(self, job: Job) -> None:
        if not self.ends[job]:
            self.ends[job] += 1
        self.queue.cancel(job)

    def turn(self) -> Batch | None:
        """Start the next batch, if a worker is free and there is one."""
        if len(self.running) == self.num_workers:
            return None
        turn = self.queue.next_turn(self.now)
        for job in turn.late:
            assert job.deadline is not None
            self.ends[job] += 1
        if turn.batch is not None:
            self._check(turn.batch)
            self.running.append(turn.batch)
        else:
            assert turn.due_at is None or self.now < turn.due_at
            assert self.running or turn.due_at is not None or self.queue.num_waiting == 0, "nothing will wake it"
            assert self.running or turn.due_at is None or turn.due_at <= self.now + MAX_DELAY_S
            self._check_asleep(turn.due_at)
        return turn.batch

    def _check_asleep(self, due_at: float | None) -> None:
        """Whoever looks before the worker is woken finds nothing to run."""
        for later_s in (0.0, 0.3 * MAX_DELAY_S, 0.9 * MAX_DELAY_S, 1.1 * MAX_DELAY_S, 3 * MAX_DELAY_S):
            if due_at is None or self.now + later_s < due_at:
                found = copy.deepcopy(self.queue).next_turn(self.now + later_s).batch
                assert found is None, "a worker sleeps while there is something to run"

    def _check(self, batch: Batch) -> None:
        assert 1 <= batch.num_items <= MAX_BATCH // (1 if batch.alone else self.num_workers)
        assert not self.running or not (batch.alone or self.running[0].alone), "what needs the whole device shares it"
        assert len({part.job.kind for part in batch.parts}) == 1
        assert len(batch.parts) == 1 or batch.parts[0].job.kind is not None
        for part in batch.parts:
            job = part.job
            assert job.lane is batch.lane
            assert not self.ends[job], "computed for the dead"
            assert job.deadline is None or self.now < job.deadline
            # Each item once, in order.
            assert part.first == sum(each.end - each.first for each in self.parts_of(job))
            self._parts[job].append(part)
            if part.first == 0:
                self.begun.append(job)

    def parts_of(self, job: Job) -> list[Part]:
        return self._parts[job]

    def finish(self, failed: bool = False) -> None:
        if not self.running:
            return
        batch = self.running.pop(0)
        self.now += A_S + B_S * batch.num_items
        for job in self.queue.finish(batch, self.now, failed):
            self.ends[job] += 1
            assert failed or sum(part.end - part.first for part in self.parts_of(job)) == job.num_items
            self.answered.append(job)

    def run_all(self) -> list[list[int]]:
        """Run until nothing waits; return the numbers of the jobs in each batch."""
        batches: list[list[int]] = []
        for _ in range(10_000):
            if (batch := self.turn()) is None and self.queue.num_waiting == 0 and not self.running:
                return batches
            if batch is not None:
                batches.append([part.job.payload for part in batch.parts])
            self.finish()
            self.now += 0 if batch else MAX_DELAY_S
        raise AssertionError("it never ends")


Ops = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(0, 2),
            st.integers(1, 30),
            st.sampled_from(Priority),
            st.none() | st.floats(-0.01, 0.3),
            st.sampled_from([None, 1, 2]),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 60)),
        st.tuples(st.just("advance"), st.sampled_from([0.0, 0.001, 0.02, 0.7])),
        st.tuples(st.just("announce"), st.integers(0, 2)),
        st.tuples(st.just("arrive"), st.integers(0, 2)),
        st.tuples(st.just("turn")),
        st.tuples(st.just("finish"), st.booleans()),
    ),
    max_size=120,
)


def play(device: Device, op: tuple) -> None:  # type: ignore[type-arg]
    name, *arguments = op
    if name == "submit":
        device.submit(*arguments)
    elif name == "cancel" and device.jobs:
        device.cancel(device.jobs[arguments[0] % len(device.jobs)])
    elif name == "advance":
        device.now += arguments[0]
    elif name == "announce":
        device.lanes[arguments[0]].num_announced += 1
    elif name == "arrive":
        lane = device.lanes[arguments[0]]
        lane.num_announced = max(0, lane.num_announced - 1)
    elif name == "turn":
        device.turn()
    elif name == "finish":
        device.finish(arguments[0])


Devices = st.sampled_from([(1, 0), (1, 4), (2, 4), (2, 1), (4, 3)])


@settings(max_examples=600, deadline=None)
@given(Devices, Ops)
def test_whatever_happens_in_whatever_order_every_job_ends_once(
    shape: tuple[int, int],
    ops: list[tuple],  # type: ignore[type-arg]
) -> None:
    device = Device(*shape)
    for op in ops:
        play(device, op)
        waiting = sum(job.num_items - job.num_taken for job in device.jobs if job.waits)
        assert device.queue.num_waiting == waiting
    device.run_all()
    assert all(device.ends[job] == 1 for job in device.jobs)
    assert not device.queue.backlog.active
    assert all(not any(lane.num_waiting) and not any(lane.waiting) for lane in device.lanes)
    for lane in device.lanes:
        for priority in Priority:
            begun = [job.payload for job in device.begun if job.lane is lane and job.priority is priority]
            assert begun == sorted(begun), "order within a priority"


@settings(max_examples=100, deadline=None)
@given(Devices, Ops)
def test_drained_it_is_empty_and_each_job_has_ended_once(
    shape: tuple[int, int],
    ops: list[tuple],  # type: ignore[type-arg]
) -> None:
    device = Device(*shape)
    for op in ops:
        play(device, op)
    while device.running:
        device.finish()
    for job in device.queue.drain():
        device.ends[job] += 1
    assert all(device.ends[job] == 1 for job in device.jobs)
    assert device.queue.num_waiting == 0
    assert device.turn() is None


def test_small_ones_are_joined_and_large_ones_cut_with_others_between() -> None:
    device = Device()
    device.submit(0, 25)
    for _ in range(3):
        device.submit(0, 2)
    # The large one lets the others in while it has more than a batch to go.
    assert device.run_all() == [[0], [1, 2, 3, 0], [0], [0]]


def test_those_that_may_not_share_run_alone_in_the_same_cuts() -> None:
    device = Device()
    for _ in range(2):
        device.submit(0, 10, kind=None)
    device.submit(0, 1)
    device.run_all()
    for job in device.jobs[:2]:
        assert [(part.first, part.end) for part in device.parts_of(job)] == [(0, 8), (8, 10)]


def test_an_idle_device_waits_only_for_what_is_on_its_way_and_not_for_long() -> None:
    device = Device()
    device.submit(0)
    assert device.turn() is not None
    device.finish()
    lane = device.lanes[0]
    lane.num_announced = 1
    device.submit(0)
    assert device.turn() is None
    assert device.queue.next_turn(device.now).due_at == device.now + MAX_DELAY_S
    device.submit(1)
    assert device.turn() is not None, "another model need not wait with it"
    device.finish()
    device.submit(0, MAX_BATCH - 1)
    assert device.turn() is not None, "a full batch need not wait"
    device.finish()
    device.submit(0)
    device.now += MAX_DELAY_S
    assert device.turn() is not None, "the oldest has waited long enough"
    device.finish()
    device.submit(0)
    lane.num_announced = 0
    assert device.turn() is not None, "nothing is on its way any more"


def test_the_urgent_go_first_and_nobody_waits_for_ever() -> None:
    device = Device()
    low = device.submit(0, MAX_BATCH, Priority.LOW)
    for _ in range(3):
        device.submit(1, MAX_BATCH, Priority.NORMAL)
    device.submit(1, MAX_BATCH, Priority.HIGH)
    assert device.run_all() == [[4], [1], [2], [3], [0]]
    device = Device()
    low = device.submit(0, MAX_BATCH, Priority.LOW)
    for _ in range(500):
        device.submit(1, MAX_BATCH, Priority.HIGH)
        device.turn()
        device.finish()
        if device.ends[low]:
            break
    assert device.ends[low] == 1
    assert 2 * PROMOTE_AFTER_S < device.now - low.queued_at < 3 * PROMOTE_AFTER_S


def test_models_share_the_device_by_time_not_by_calls() -> None:
    device = Device()
    for _ in range(30):
        device.submit(0, MAX_BATCH)
    for _ in range(60):
        device.submit(1, 1, kind=None)
    for _ in range(20):
        device.turn()
        device.finish()
    used = [lane.used_s for lane in device.lanes[:2]]
    assert used[0] == pytest.approx(used[1], abs=A_S + B_S * MAX_BATCH)
    # A model that comes later gets its share from now on, and no more.
    for _ in range(60):
        device.submit(2, 1, kind=None)
    begun = len(device.begun)
    for _ in range(12):
        device.turn()
        device.finish()
    newcomers = sum(job.lane is device.lanes[2] for job in device.begun[begun:])
    assert 3 <= newcomers <= 7


def learned(device: Device) -> None:
    """Let the lanes' estimates know the device."""
    for num_items in (1, 8, 3, 5):
        for lane in range(2):
            device.submit(lane, num_items)
            device.turn()
            device.finish()


def test_the_estimate_counts_what_runs_what_is_ahead_and_the_others_share() -> None:
    device = Device()
    learned(device)
    lane, full_s = device.lanes[0], A_S + B_S * MAX_BATCH
    assert device.queue.backlog.wait_s(lane, 8, Priority.NORMAL, device.now) == pytest.approx(full_s)
    device.submit(0, 16)
    device.turn()
    device.submit(1, 80)
    # The rest of the batch that runs, eight images ahead and eight of its own; the other model gets as long.
    assert device.queue.backlog.wait_s(lane, 8, Priority.NORMAL, device.now) == pytest.approx(5 * full_s)
    assert device.queue.backlog.wait_s(lane, 8, Priority.HIGH, device.now) == pytest.approx(2 * full_s)
    assert device.queue.backlog.all_s(device.now) == pytest.approx(12 * full_s)


def test_what_would_be_late_is_dropped_when_its_turn_comes_not_computed() -> None:
    device = Device()
    learned(device)
    full_s = A_S + B_S * MAX_BATCH
    device.submit(0, MAX_BATCH)
    kept, dropped = device.submit(0, 8, in_s=2.3 * full_s), device.submit(0, 8, in_s=2.5 * full_s)
    begun = len(device.begun)
    device.run_all()
    assert kept in device.answered
    assert dropped not in device.begun[begun:]
    assert device.ends[dropped] == 1


def test_in_a_batch_that_is_full_it_must_have_time_for_the_whole_batch() -> None:
    device = Device()
    learned(device)
    device.submit(0, 7)
    dropped = device.submit(0, 1, in_s=A_S + 2 * B_S)
    device.run_all()
    assert dropped not in device.answered
    alone = device.submit(0, 1, in_s=A_S + 2 * B_S)
    device.run_all()
    assert alone in device.answered


def test_the_less_urgent_never_make_the_urgent_late() -> None:
    device = Device()
    learned(device)
    device.submit(0, 7, Priority.LOW)
    device.submit(0, 1, Priority.HIGH, in_s=A_S + 2 * B_S)
    assert device.run_all()[-2:] == [[9], [8]]


@given(
    st.floats(0, 0.1),
    st.floats(1e-5, 0.1),
    st.lists(st.integers(1, 64), min_size=4, max_size=50).filter(lambda n: len(set(n)) > 1),
)
def test_the_fit_finds_the_line(a: float, b: float, sizes: list[int]) -> None:
    fit = DurationFit()
    for size in sizes:
        fit.add(size, a + b * size, now=1.0)
    assert fit.line() == pytest.approx((a, b), rel=1e-3, abs=1e-5)


def test_the_fit_forgets_and_one_stall_does_not_move_it_far() -> None:
    fit = DurationFit()
    assert fit.duration_s(8, now=0.0) == 0
    for number in range(20):
        fit.add(1 + number % 8, 0.01 + 0.001 * (1 + number % 8), now=number / 100)
    before = fit.duration_s(8, now=0.2)
    fit.add(8, 60.0, now=0.2)
    assert fit.duration_s(8, now=0.2) < 1.5 * before
    # What lasts is learned.
    for number in range(150):
        fit.add(1 + number % 8, 0.1, now=0.3)
    assert fit.duration_s(8, now=0.3) == pytest.approx(0.1, rel=0.1)
    # What nothing has confirmed for long is no ground to refuse.
    assert fit.duration_s(8, now=0.3 + 2 * MAX_AGE_S) == 0


def test_of_one_size_alone_the_fit_promises_no_more_than_it_saw() -> None:
    fit = DurationFit()
    for _ in range(5):
        fit.add(4, 0.02, now=1.0)
    assert fit.duration_s(4, 1.0) == pytest.approx(0.02)
    assert fit.duration_s(1, 1.0) == pytest.approx(0.005)
    assert fit.duration_s(8, 1.0, max_batch=4) == pytest.approx(0.04)


def test_room_is_counted_by_items_bytes_models_and_streams_and_given_back() -> None:
    lane, other = Lane(), Lane()
    room = Room(Limits(items=10, model_items=6, num_bytes=100, streams=2))
    room.enter(Load(1), 0.0)
    with pytest.raises(QueueFull, match="1 of 10 items"):
        room.enter(Load(10), 0.0)
    room.enter(Load(5, [lane], 60), 0.0)
    with pytest.raises(QueueFull, match=r"this model is full \(5 of 6 items\)"):
        room.enter(Load(2, [lane]), 0.0)
    with pytest.raises(QueueFull, match="60 of 100 bytes"):
        room.enter(Load(1, [other], 41), 0.0)
    room.enter(Load(1, [other], stream=True), 0.0)
    room.enter(Load(1, [other], stream=True), 0.0)
    with pytest.raises(QueueFull, match="2 of 2 streams"):
        room.enter(Load(1, [other], stream=True), 0.0)
    assert (room.num_items, room.num_bytes, room.num_streams) == (8, 60, 2)
    for load in (Load(1), Load(5, [lane], 60), Load(1, [other], stream=True), Load(1, [other], stream=True)):
        room.leave(load)
    assert (room.num_items, room.num_bytes, room.num_streams, lane.num_admitted, other.num_admitted) == (0, 0, 0, 0, 0)


def test_the_hint_is_the_time_until_there_is_room() -> None:
    room = Room(Limits(items=100))
    room.enter(Load(100), 0.0)
    for num_items, backlog_s, hint_s in (
        (25, 4.0, 1.0),
        (1000, 4.0, 4.0),
        (25, 0.0, 1.0),
        (1, 0.01, 0.05),
        (99, 1e6, 30.0),
    ):
        with pytest.raises(QueueFull) as caught:
            room.enter(Load(num_items), backlog_s)
        assert caught.value.retry_after_s == pytest.approx(hint_s)
    assert room.num_items == 100


def test_what_runs_longer_than_expected_is_overdue() -> None:
    queue, lane = BatchQueue(), Lane()
    assert queue.backlog.overdue_s(0.0) == 0.0
    queue.submit(Job(lane, 1), 0.0)
    batch = queue.next_turn(0.0).batch
    assert batch is not None
    assert queue.backlog.overdue_s(3.0) == 3.0, "nothing was expected yet"
    queue.finish(batch, 4.0)
    queue.submit(Job(lane, 1), 5.0)
    assert queue.next_turn(5.0).batch is not None
    assert queue.backlog.overdue_s(8.0) == 0.0
    assert queue.backlog.overdue_s(11.0) == pytest.approx(2.0)


def test_workers_share_what_waits_and_none_waits_for_another() -> None:
    device = Device(num_workers=2, beside_from=4)
    jobs = [device.submit(0) for _ in range(7)]
    first, second = device.turn(), device.turn()
    assert first is not None
    assert second is not None
    assert (first.num_items, second.num_items, first.alone) == (4, 3, False)
    late = [device.submit(0) for _ in range(4)]
    device.finish()
    # The other still runs; half a full batch is enough.
    third = device.turn()
    assert third is not None
    assert len(device.running) == 2
    assert third.num_items == 4
    device.run_all()
    assert all(device.ends[job] == 1 for job in [*jobs, *late])


def test_a_few_have_the_whole_device_if_it_is_idle_and_beside_others_wait_a_little_for_more() -> None:
    device = Device(num_workers=2, beside_from=4)
    device.submit(0, 3)
    batch = device.turn()
    assert batch is not None
    assert batch.alone
    device.finish()
    device.submit(0, 4)
    device.turn()
    device.turn()
    device.finish()
    assert len(device.running) == 1
    device.submit(0)
    assert device.turn() is None
    device.now += MAX_DELAY_S
    alone = device.turn()
    assert alone is not None
    assert not alone.alone


def test_what_needs_the_whole_device_is_not_overtaken_while_others_end() -> None:
    device = Device(num_workers=2, beside_from=4)
    device.submit(0, 8)
    device.turn()
    device.turn()
    whole = device.submit(2, kind=None)
    device.finish()
    device.submit(0, 8)
    assert device.turn() is None
    device.finish()
    batch = device.turn()
    assert batch is not None
    assert batch.alone
    assert batch.parts[0].job is whole


def test_what_needs_one_worker_runs_beside_the_others_batches() -> None:
    device = Device(num_workers=2, beside_from=4)
    device.submit(0, 4)
    device.turn()
    device.turn()
    device.finish()
    job = Job(device.lanes[2], 1, "trial", Priority.LOW, beside=True)
    device.jobs.append(job)
    device.queue.submit(job, device.now)
    batch = device.turn()
    assert batch is not None
    assert len(device.running) == 2
    assert batch.parts[0].job is job


# At the sizes of a server, on a device that needs a line of 3 ms an image


def timed_queue(num_workers: int) -> tuple[BatchQueue, Lane]:
    queue = BatchQueue(num_workers=num_workers)
    lane = Lane(beside_from=4 if num_workers > 1 else 0)
    for num_items in (1, 4, 8, 16) * 8:
        lane.fit.add(num_items, IMAGE_S * num_items, 99.9)
    return queue, lane


IMAGE_S = 0.003


def shares(queue: BatchQueue, now: float) -> list[int]:
    """Let all free workers begin; return the sizes of their batches."""
    sizes = []
    while (batch := queue.next_turn(now).batch) is not None:
        sizes.append(batch.num_items)
    return sizes


@pytest.mark.parametrize(("num_workers", "num_items"), [(2, 4), (2, 8), (2, 15), (4, 4), (4, 12), (4, 15), (3, 30)])
def test_a_call_on_an_idle_device_is_cut_for_all_its_workers_at_once(num_workers: int, num_items: int) -> None:
    queue, lane = timed_queue(num_workers)
    queue.submit(Job(lane, num_items, kind=1), 100.0)
    sizes = shares(queue, 100.0)
    assert len(sizes) == num_workers
    assert sum(sizes) == num_items
    assert max(sizes) - min(sizes) <= 1


def served(num_workers: int, calls: Sequence[tuple[int, float]]) -> tuple[int, int, int]:
    """Bring calls (images, seconds to their deadline) at once; return how many were let in, dropped and in time."""
    queue, lane = timed_queue(num_workers)
    now, running, num_late, ended, admitted = 100.0, list[tuple[float, int, Batch]](), 0, list[bool](), 0
    for num_items, in_s in calls:
        if MARGIN * queue.backlog.wait_s(lane, num_items, Priority.NORMAL, now) <= in_s:
            admitted += 1
            queue.submit(Job(lane, num_items, kind=1, deadline=now + in_s), now)
    while True:
        turn = queue.next_turn(now)
        num_late += len(turn.late)
        if turn.batch is not None:
            ends_at = now + IMAGE_S * turn.batch.num_items * (1 if turn.batch.alone else num_workers)
            heapq.heappush(running, (ends_at, id(turn.batch), turn.batch))
        elif turn.due_at is not None and (not running or turn.due_at < running[0][0]):
            now = turn.due_at
        elif running:
            now, _, batch = heapq.heappop(running)
            ended += [job.deadline is not None and now <= job.deadline for job in queue.finish(batch, now)]
        elif not turn.late:
            return admitted, num_late, sum(ended)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize(
    "calls",
    [
        [(32, 1.4 * IMAGE_S * 32 * (number + 1) + 0.05) for number in range(10)],
        [(1, 0.075)] * 16,
        [(1, 0.045)] * 8,
        [(20, 0.5), (3, 0.5)] * 4,
    ],
    ids=["large ones in order", "a burst of one image each", "half of that", "both"],
)
def test_what_is_let_in_on_an_idle_device_is_in_time(num_workers: int, calls: Sequence[tuple[int, float]]) -> None:
    admitted, num_late, in_time = served(num_workers, calls)
    assert admitted >= len(calls) - 1
    assert (num_late, in_time) == (0, admitted)


def one_worker_busy() -> tuple[BatchQueue, Lane]:
    """Return a queue of two workers, of which one is free at 100.01."""
    queue, lane = timed_queue(2)
    queue.submit(Job(lane, 32, kind=1), 100.0)
    assert shares(queue, 100.0) == [16, 16]
    queue.finish(queue.backlog.running[0], 100.01)
    return queue, lane


def test_who_waits_behind_what_needs_the_whole_device_is_woken_in_time() -> None:
    queue, lane = one_worker_busy()
    alone = Job(Lane(), 1, priority=Priority.LOW, deadline=100.05)
    queue.submit(alone, 100.01)
    # Its own time may run out.
    assert queue.next_turn(100.01).due_at == 100.05
    # The urgent do not wait for more of them, nor behind it.
    urgent = Job(lane, 1, kind=1, priority=Priority.HIGH)
    assert queue.submit(urgent, 100.01)
    batch = queue.next_turn(100.01).batch
    assert batch is not None
    assert batch.parts[0].job is urgent


def test_with_what_they_waited_behind_cancelled_others_run() -> None:
    queue, lane = one_worker_busy()
    alone = Job(Lane(), 1)
    queue.submit(alone, 100.01)
    queue.submit(Job(lane, 16, kind=1), 100.01)
    assert queue.next_turn(100.01).batch is None
    queue.cancel(alone)
    assert shares(queue, 100.01) == [16]


def test_an_image_that_would_be_late_by_waiting_for_others_does_not() -> None:
    queue, lane = one_worker_busy()
    queue.submit(Job(lane, 1, kind=1), 100.01)
    assert queue.next_turn(100.01).due_at == pytest.approx(100.01 + batching.MAX_DELAY_S)
    queue.submit(Job(lane, 1, kind=1, priority=Priority.LOW, deadline=100.028), 100.01)
    assert shares(queue, 100.01) == [2]


def test_the_estimate_knows_who_waits_for_whom() -> None:
    queue, lane = timed_queue(4)
    queue.submit(Job(lane, 24, kind=1), 100.0)
    assert shares(queue, 100.0) == [6] * 4
    queue.finish(queue.backlog.running[0], 100.0, failed=True)
    wait_s = queue.backlog.wait_s
    # A worker is free: it takes this one at once, on a quarter of the device.
    assert wait_s(lane, 1, Priority.NORMAL, 100.0) == pytest.approx(4 * IMAGE_S)
    # What needs the whole device waits for the slowest.
    other = Lane()
    for _ in range(5):
        other.fit.add(1, 0.01, 100.0)
    assert wait_s(other, 1, Priority.NORMAL, 100.0) == pytest.approx(4 * 6 * IMAGE_S + 0.01)
    # So do images that join no others.
    assert wait_s(lane, 1, Priority.NORMAL, 100.0, joins=False) == pytest.approx(4 * 6 * IMAGE_S + IMAGE_S)
