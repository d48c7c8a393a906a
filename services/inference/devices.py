"""The devices of the server, each with a scheduler: a call goes to the one that would answer it first, and stays there.

Every model is on all of them. A device may be named twice (`cpu,cpu`): two replicas with a thread each.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from services.inference.loading import Served, ServedClassifier, ServedLanguageModel
from services.inference.runtimes.openvino import num_streams
from services.inference.scheduler import DeviceScheduler, Priority
from services.inference.statistics import ModelStatistics
from tandem.errors import InvalidRequest
from tandem.models.devices import resolve_device

S = TypeVar("S", ServedClassifier, ServedLanguageModel)


class Devices:
    """The schedulers, in the order of the setting; one at the least."""

    def __init__(self, schedulers: Sequence[DeviceScheduler]) -> None:
        self._schedulers = tuple(schedulers)

    def __len__(self) -> int:
        return len(self._schedulers)

    def __iter__(self) -> Iterator[DeviceScheduler]:
        return iter(self._schedulers)

    def __getitem__(self, number: int) -> DeviceScheduler:
        return self._schedulers[number]

    def names(self) -> tuple[str, ...]:
        """Return what they are called."""
        return tuple(str(scheduler.device) for scheduler in self)

    def choose(self, served: S, priority: Priority) -> tuple[DeviceScheduler, S]:
        """Return where a call is answered first, and the model as it is there."""
        number = self.pick([(each.runtime,) for each in served.everywhere], priority)
        return self[number], served.on(number)

    def pick(self, runtimes: Sequence[Sequence[object]], priority: Priority) -> int:
        """Return the number of the device that would soonest begin with a call of all of its `runtimes`.

        One whose thread has failed is chosen only where all have.
        """
        if len(self) == 1:
            return 0

        def cost(number: int) -> tuple[bool, float, int]:
            scheduler = self[number]
            # What the call itself takes is the same on each, but not known alike. Before the first batches nothing is
            # known: then the fewest items.
            return not scheduler.is_alive, scheduler.ahead_s(runtimes[number], priority), scheduler.num_items

        return min(range(len(self)), key=cost)

    def least_busy(self, priority: Priority) -> DeviceScheduler:
        """Return the scheduler with the least to do."""
        return self[self.pick([()] * len(self), priority)]

    def num_late(self) -> int:
        """Return how many calls were refused so far, since they were late when they came or in the queue."""
        refusals = self.refusals()
        return refusals["deadline"] + refusals["late"]

    def asked_s(self) -> float:
        """Return for how many seconds of a device calls have asked so far, let in or not, as far as can be told."""
        return sum(scheduler.asked_s for scheduler in self) / len(self)

    def note_shed(self) -> None:
        """Count a call that was refused as it arrived; no device was chosen for it, so the first one counts it."""
        self[0].refuse("overload")

    def is_busy(self, served: Served) -> bool:
        """Return whether calls hold room for `served` on any of them."""
        numbered = enumerate(self)
        return any(
            scheduler.is_busy(runtime) for number, scheduler in numbered for runtime in served.on(number).runtimes
        )

    def statistics(self, served: Served) -> ModelStatistics:
        """Return what was done with `served` so far, on all of them together."""
        first, *others = [scheduler.statistics(served.on(number).runtime) for number, scheduler in enumerate(self)]
        return sum(others, first)

    def pending(self, served: Served) -> tuple[int, int]:
        """Return how many jobs and items of `served` wait for any of them."""
        pending = [scheduler.pending(*served.on(number).runtimes) for number, scheduler in enumerate(self)]
        return sum(jobs for jobs, _ in pending), sum(items for _, items in pending)

    def refusals(self) -> dict[str, int]:
        """Return how many calls were not let in, or were late in the queue, by the reason."""
        counts = Counter[str]()
        for scheduler in self:
            counts.update(scheduler.refusals())
        return dict(counts)

    @property
    def num_items(self) -> int:
        """Items that calls hold room for."""
        return sum(scheduler.num_items for scheduler in self)

    @property
    def num_bytes(self) -> int:
        """Bytes of the requests of those calls."""
        return sum(scheduler.num_bytes for scheduler in self)

    @property
    def num_streams(self) -> int:
        """Streams of texts that are open."""
        return sum(scheduler.num_streams for scheduler in self)

    def close(self) -> None:
        """Close all of them."""
        for scheduler in self:
            scheduler.close()


def num_workers(device: torch.device) -> int:
    """Return how many batches may run on `device` beside each other."""
    return num_streams(torch.get_num_threads()) if device.type == "cpu" else 1


def resolve_devices(names: str) -> list[torch.device]:
    """Return the devices of a setting such as "auto" or "cuda:0,cuda:1"; raise InvalidRequest."""
    devices = [resolve_device(name.strip()) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise InvalidRequest("name devices of one kind: their answers differ in the last bits", field="device")
    return devices
