"""Slots: the equal shares of a machine, each of which carries one run at a time."""

import fcntl
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tandem.errors import InvalidRequest
from tandem.gpus import Gpu, gpu_class

T = TypeVar("T")

# A machine without GPUs carries jobs of so many processes at most; they share its cores.
_MOST_CPU_PROCESSES = 8
_QUEUE = re.compile(r"cpu|(default|gpu(-[a-z0-9]+)*?)(-x[1-9]\d*)?")


@dataclass(frozen=True)
class Slot:
    """A share: the GPUs by their UUIDs, and the cores by their numbers; none of either where it is the whole."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """Return what a process in this slot has in its environment."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}

    def enter(self) -> None:
        """Bind the calling process to the slot's cores."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)


WHOLE = Slot()


def plan_slots(num_slots: int | None, gpus: Sequence[Gpu], cores: Sequence[int]) -> list[Slot]:
    """Share a machine out: one slot for each GPU, or one for a machine without, unless `num_slots` says otherwise.

    Raises InvalidRequest where the GPUs, or the cores of a machine without, can't be shared so.
    """
    count = num_slots or len(gpus) or 1
    if gpus and len(gpus) % count:
        raise InvalidRequest(f"TANDEM_SLOTS={count}: the {len(gpus)} GPUs here can't be shared out equally")
    if count > len(cores):
        raise InvalidRequest(f"TANDEM_SLOTS={count}: there are {len(cores)} cores here")
    if count == 1:
        return [WHOLE]
    uuids = [gpu.uuid for gpu in gpus]
    return [Slot(tuple(_share(uuids, count, i)), tuple(_share(cores, count, i))) for i in range(count)]


def _share(things: Sequence[T], count: int, index: int) -> Sequence[T]:
    return things[len(things) * index // count : len(things) * (index + 1) // count]


def queues_of(names: Sequence[str] | None, gpus: Sequence[Gpu], num_slots: int) -> list[str]:
    """Return the queues that a worker takes from; `names` are what its settings name, None for all that fit.

    `default` and `gpu` bring those of several devices along, up to what a slot has, and of the GPUs' class where all of
    them are of one.
    """
    most = len(gpus) // num_slots if gpus else _MOST_CPU_PROCESSES
    classes = {gpu_class(gpu.name) for gpu in gpus}
    queues = []
    for name in names if names is not None else ("default", "cpu", "gpu") if gpus else ("default", "cpu"):
        bases = [name, f"gpu-{classes.copy().pop()}"] if name == "gpu" and len(classes) == 1 else [name]
        for base in bases:
            queues += [base, *(f"{base}-x{count}" for count in range(2, most + 1) if base != "cpu")]
    return queues


def named_queues(text: str) -> list[str]:
    """Return the queues of a list with commas, none for none; raise InvalidRequest for a name that no job leads to."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not _QUEUE.fullmatch(name):
            raise InvalidRequest(f"no job leads to a queue {name!r}: write default, cpu, gpu, gpu-CLASS, or gpu-x8")
    return names


def claim_slot(folder: Path, slots: Sequence[Slot]) -> Slot:
    """Return a slot that no other process has claimed in `folder`; it is this process's until it ends."""
    for number, slot in enumerate(slots):
        descriptor = os.open(folder / f"slot-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        # Left open: the kernel gives the slot back when the process ends.
        return slot
    raise AssertionError("as many slots as children")
