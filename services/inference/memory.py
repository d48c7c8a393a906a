"""The memory that models take: how much there is, how much of it is taken, and by what.

A version counts from the moment at which its load begins, with what it is expected to need, until the last call that
uses it has let go of it, dropped or not.
"""

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

# The rest is for decoded images, texts under way, the libraries (0.5 GB), and whatever else the machine does.
CPU_SHARE, GPU_SHARE = 0.5, 0.7

_MEMORY_FILES = ("memory.max", "memory.limit_in_bytes")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(eq=False, slots=True, weakref_slot=True)
class Footprint:
    """What a version takes in bytes; all that serve it share one, which lives as long as the last of them."""

    num_bytes: int = 0


class MemoryBudget:
    """`num_bytes` for all; used on one event loop. `on_release` is called, on any thread, when a footprint has gone."""

    def __init__(self, num_bytes: int, on_release: Callable[[], None] = lambda: None) -> None:
        self.num_bytes = num_bytes
        self.on_release = on_release
        self._reserved = 0
        self._held = 0
        # The last holder may let go on any thread, also amid the collector: an append needs no lock.
        self._gone: deque[int] = deque()

    @property
    def held(self) -> int:
        """Bytes of the versions that are alive."""
        while self._gone:
            self._held -= self._gone.popleft()
        return self._held

    def hold(self, footprint: Footprint) -> None:
        """Count `footprint` for as long as it lives."""
        self._held += footprint.num_bytes
        weakref.finalize(footprint, self._let_go, footprint.num_bytes).atexit = False

    def reserve(self, num_bytes: int) -> None:
        """Count `num_bytes` for what is being loaded; a negative number gives them back."""
        self._reserved += num_bytes

    def lacks(self, num_bytes: int) -> int:
        """Return how many bytes must go before `num_bytes` more fit; 0 or below if they do."""
        return self.held + self._reserved + num_bytes - self.num_bytes

    def _let_go(self, num_bytes: int) -> None:
        self._gone.append(num_bytes)
        self.on_release()


def default_budget(device: torch.device) -> int:
    """Return the bytes that models may take on `device` if nobody says otherwise."""
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(CPU_SHARE * machine_memory())


def machine_memory(cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes of RAM that this process may use: the machine's, or the least limit of its control groups."""
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    return min([total * 1024, *_limits(cgroups, membership)])


def _limits(cgroups: Path, membership: Path) -> Iterator[int]:
    try:
        groups = [line.split(":", 2)[1:] for line in membership.read_text().splitlines()]
    except OSError:
        return
    for controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        group = root / path.lstrip("/")
        # In a container the path is often the host's; what is mounted is the container's own group.
        for directory in (group, *group.parents):
            if directory.is_relative_to(root):
                yield from _limits_in(directory)


def _limits_in(directory: Path) -> Iterator[int]:
    for name in _MEMORY_FILES:
        try:
            text = (directory / name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            yield int(text)


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of `module`, shared ones once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def taken_on(device: torch.device) -> int:
    """Return the bytes that this process has on `device`, of whatever kind; 0 where that can't be seen."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return_to_system()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def return_to_system() -> None:
    """Give freed memory back to the system; glibc keeps up to a quarter of what three ResNet-50 had. Takes 0.6 ms."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
