"""What a checkpoint takes on the volume, and what the volume has left."""

import math
import os
from pathlib import Path

from tandem.errors import VolumeUnavailable

# Beside the files themselves: their last blocks, directories and pointers (on tmpfs six files of 71 kB took 90 kB), and
# the curves, the log and the status that are written meanwhile.
_SHARE, _BYTES = 1 / 16, 2**20


def room_needed(num_bytes: int) -> int:
    """Return the bytes that must be free before a checkpoint of `num_bytes` is written."""
    return num_bytes + int(num_bytes * _SHARE) + _BYTES


def free_bytes(path: Path) -> int:
    """Return what this user may still write to the volume of the directory `path`, in bytes, quotas aside."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def bytes_on_disk(checkpoint: Path) -> int:
    """Return what removing `checkpoint` would free, in bytes."""
    return sum(path.stat().st_blocks * 512 for path in checkpoint.iterdir())


def too_little(num_bytes: int, free: int, directory: Path, remedy: str) -> VolumeUnavailable:
    """Return the error of a checkpoint of `num_bytes` for which `directory` has no more than `free` bytes."""
    # Rounded apart, so that the two never look equal.
    need, there = math.ceil(room_needed(num_bytes) / 1e5) / 10, math.floor(free / 1e5) / 10
    return VolumeUnavailable(
        f"a checkpoint of {num_bytes / 1e6:.1f} MB needs {need:.1f} MB; {directory} has {there:.1f} MB free: {remedy}"
    )
