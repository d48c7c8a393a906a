"""GPUs without torch, through a fake of the little of NVML that is used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.gpus import Gpu, Reading, gpu_class, list_gpus, read_gpus

GIB = 2**30


class FakeError(Exception):
    pass


@dataclass
class FakeNvml:
    """GPUs by name; `broken` names the functions that fail, for all GPUs or, with an index behind it, for one."""

    names: Sequence[str] = ("NVIDIA H200", "NVIDIA H200", "NVIDIA A100-SXM4-80GB")
    broken: Sequence[str] = ()
    starts: int = 0
    NVMLError: type[Exception] = field(default=FakeError)

    def _try(self, *functions: str) -> None:
        if set(functions) & set(self.broken):
            raise FakeError

    def nvmlInit(self) -> None:
        self._try("init")
        self.starts += 1

    def nvmlShutdown(self) -> None:
        self.starts -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._try("count")
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        assert self.starts == 1
        self._try(f"handle {index}")
        return index

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return f"GPU-{handle}f0c-11"

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return self.names[int(handle)]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(total=(handle + 1) * 10 * GIB, used=(handle + 1) * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        self._try("utilization", f"utilization {handle}")
        return SimpleNamespace(gpu=25 * (handle + 1), memory=99)


def visible(entry: str | None, nvml: FakeNvml | None = None) -> list[int]:
    environment = {} if entry is None else {"CUDA_VISIBLE_DEVICES": entry}
    return [gpu.index for gpu in list_gpus(nvml or FakeNvml(), environment)]


def test_gpus_are_listed_and_nvml_is_stopped_again() -> None:
    nvml = FakeNvml()
    assert list_gpus(nvml, {})[2] == Gpu(2, "GPU-2f0c-11", "NVIDIA A100-SXM4-80GB", 30 * GIB)
    assert nvml.starts == 0


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", [1]),
        ("2, 0", [2, 0]),
        ("0,7,1", [0]),
        ("1,1", []),
        ("GPU-2f0c-11,GPU-0", [2, 0]),
        ("GPU-", []),
        ("GPU-9", []),
        ("MIG-0a1b", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(entry: str | None, expected: list[int]) -> None:
    assert visible(entry) == expected


def test_readings_are_in_bytes_and_shares() -> None:
    nvml = FakeNvml(broken=["utilization 2"])
    one, _, three = read_gpus(nvml, {})
    assert one == Reading(Gpu(0, "GPU-0f0c-11", "NVIDIA H200", 10 * GIB), GIB, 0.25)
    assert (three.memory_used_bytes, three.utilization) == (3 * GIB, None)
    assert nvml.starts == 0


def test_without_a_driver_there_are_none() -> None:
    nvml = FakeNvml(broken=["init"])
    assert (list_gpus(nvml, {}), read_gpus(nvml, {})) == ([], [])
    assert nvml.starts == 0, "what was never started is not stopped"
    assert list_gpus(FakeNvml(broken=["count"]), {}) == []


def test_one_that_is_lost_hides_no_other() -> None:
    lost = FakeNvml(broken=["handle 1"])
    assert visible(None, lost) == [0, 2]
    assert visible("2,0", lost) == [2, 0]


def test_the_installed_library_can_be_asked_on_any_machine() -> None:
    assert all(gpu.memory_bytes > 0 and gpu.uuid.startswith("GPU-") for gpu in list_gpus())


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("Tesla T4", "tesla-t4"),
        ("NVIDIA GH200 480GB (rev. A)", "gh200-480gb-rev-a"),
    ],
)
def test_a_class_of_gpu_is_a_slug(name: str, slug: str) -> None:
    assert gpu_class(name) == slug
