"""What waits for a device: lanes of jobs, and the batches that are made of them. Plain state."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from services.inference.estimates import DurationFit
from services.inference.statistics import ModelStatistics

# After so long in a queue a job counts as one priority higher, so that the urgent never starve the rest.
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
    # Seconds of the whole device; a lane that was empty starts level with the others.
    used_s: float = 0.0
    # From so many images on, batches run beside each other, on one worker each; 0: never.
    beside_from: int = 0

    @property
    def num_jobs(self) -> int:
        """Jobs in `waiting`."""
        return sum(len(jobs) for jobs in self.waiting)

    def heads(self) -> Iterator["Job"]:
        """Yield the first job of each priority that has one."""
        for jobs in self.waiting:
            if jobs:
                yield next(iter(jobs))

    def as_urgent(self, priority: Priority) -> int:
        """Return how many items wait that are as urgent as `priority`, or more."""
        return sum(self.num_waiting[: priority + 1])


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
    # Of no kind, but needs one worker alone, beside whatever runs.
    beside: bool = False
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
    """What runs at once: `alone` on the whole device, or on one worker beside others."""

    lane: Lane
    parts: tuple[Part, ...]
    started_at: float
    alone: bool = True

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
