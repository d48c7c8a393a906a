"""Which device and which precision a spec or a setting means, and what is set for a device that answers."""

from functools import cache
from pathlib import Path
from typing import Literal

import torch

from tandem.errors import InvalidRequest

# Instructions that multiply bfloat16: Intel and AMD, and Arm.
_BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


def resolve_device(name: str) -> torch.device:
    """Return the device of "auto", "cpu", "cuda" or "cuda:N"; raise InvalidRequest if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequest(f"{name!r} is no device; use auto, cpu, cuda or cuda:N", field="device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise InvalidRequest(f"device {name!r} is not here ({there} CUDA devices); use cpu", field="device")
    return device


def configure_device(device: torch.device) -> None:
    """Set what holds for the whole process: deterministic float32 without TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def resolve_precision(
    name: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """Return what "auto" means on `device`: bfloat16 where it has instructions for it; other names as they are.

    Elsewhere bfloat16 is emulated, and slower than float32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    return "bfloat16" if _cpu_has_bfloat16() else "float32"


@cache
def _cpu_has_bfloat16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not _BFLOAT16_FLAGS.isdisjoint(flags.split())
