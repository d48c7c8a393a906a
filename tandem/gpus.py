"""The GPUs of this machine, by NVML: without torch, and without a CUDA context, which would not survive a fork.

Where library or driver is missing there are none; that is never an error.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Gpu:
    """One GPU: `index` as nvidia-smi counts, `name` as NVML says it, `memory_bytes` in all."""

    index: int
    uuid: str
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Reading:
    """What a GPU did just now: memory in use in bytes, and the share of time in which it computed, 0 to 1.

    Either is None where the GPU does not tell.
    """

    gpu: Gpu
    memory_used_bytes: int | None
    utilization: float | None


class Nvml(Protocol):
    """The part of `pynvml` that is used."""

    @property
    def NVMLError(self) -> type[Exception]:
        """What every function raises."""
        ...

    def nvmlInit(self) -> None: ...  # noqa: D102
    def nvmlShutdown(self) -> None: ...  # noqa: D102
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: D102
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: D102
    def nvmlDeviceGetUUID(self, handle: Any) -> str: ...  # noqa: D102
    def nvmlDeviceGetName(self, handle: Any) -> str: ...  # noqa: D102
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...  # noqa: D102
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any: ...  # noqa: D102


def list_gpus(nvml: Nvml | None = None, environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves to this process, in its order.

    Indices are taken as nvidia-smi's: where GPUs of several kinds share a machine, CUDA counts so only with
    CUDA_DEVICE_ORDER=PCI_BUS_ID. `nvml` defaults to that of the driver.
    """
    with _started(nvml) as library:
        return [] if library is None else [gpu for gpu, _ in _visible(library, environment)]


def read_gpus(nvml: Nvml | None = None, environment: Mapping[str, str] = os.environ) -> list[Reading]:
    """Return a reading of each GPU that `list_gpus` returns."""
    with _started(nvml) as library:
        if library is None:
            return []
        return [_read(library, gpu, handle) for gpu, handle in _visible(library, environment)]


def gpu_class(name: str) -> str:
    """Return the class of GPU that `name` is, as a slug: `NVIDIA A100-SXM4-80GB` is `a100-sxm4-80gb`."""
    return re.sub(r"[^a-z0-9]+", "-", name.removeprefix("NVIDIA ").lower()).strip("-")


@contextmanager
def _started(nvml: Nvml | None) -> Iterator[Nvml | None]:
    """Start NVML, and stop it afterwards so that no child inherits it; None where there is none."""
    library = nvml or _installed()
    if library is not None:
        try:
            library.nvmlInit()
        except library.NVMLError:
            library = None
    try:
        yield library
    finally:
        if library is not None:
            library.nvmlShutdown()


def _installed() -> Nvml | None:
    try:
        import pynvml
    except ImportError:
        return None
    library: Nvml = pynvml
    return library


def _visible(nvml: Nvml, environment: Mapping[str, str]) -> list[tuple[Gpu, Any]]:
    known = _known(nvml)
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return known
    places = _places(wanted.split(","), [gpu for gpu, _ in known])
    return [known[place] for place in places]


def _known(nvml: Nvml) -> list[tuple[Gpu, Any]]:
    found = []
    for index in range(_count(nvml)):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
            found.append((Gpu(index, uuid, name, int(nvml.nvmlDeviceGetMemoryInfo(handle).total)), handle))
        except nvml.NVMLError:
            # One that has fallen off the bus, or that belongs to another container; the others are there.
            continue
    return found


def _count(nvml: Nvml) -> int:
    try:
        return nvml.nvmlDeviceGetCount()
    except nvml.NVMLError:
        return 0


def _places(wanted: Sequence[str], gpus: Sequence[Gpu]) -> list[int]:
    """Return the places in `gpus` of what CUDA_VISIBLE_DEVICES names, by CUDA's own rules.

    What it does not know hides all that follow; what is named twice hides everything. Slices of a GPU (MIG) are not
    known here.
    """
    places: list[int] = []
    for entry in (each.strip() for each in wanted):
        matching = [place for place, gpu in enumerate(gpus) if _names(entry, gpu)]
        if len(matching) != 1:
            break
        if matching[0] in places:
            return []
        places.append(matching[0])
    return places


def _names(entry: str, gpu: Gpu) -> bool:
    # The first signs of a UUID are enough for CUDA.
    return gpu.uuid.startswith(entry) if entry.startswith("GPU-") else entry == str(gpu.index)


def _read(nvml: Nvml, gpu: Gpu, handle: Any) -> Reading:
    try:
        used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    except nvml.NVMLError:
        used = None
    try:
        utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except nvml.NVMLError:
        # Virtual and sliced GPUs have no such counter.
        utilization = None
    return Reading(gpu, used, utilization)
