"""Sizes in bytes, as people write and read them."""

import re

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = re.compile(r"(?P<number>\d{1,15}(?:\.\d{1,6})?)\s*(?P<unit>[a-z]*)")


def parse_size(text: str) -> int:
    """Return the bytes of "1500000000", "1.5GB" or "2 GiB"; raise ValueError."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match["unit"] not in _UNITS:
        raise ValueError(f"{text!r} is no size: write bytes, or 512MiB, 2GiB, 1.5GB")
    return int(float(match["number"]) * _UNITS[match["unit"]])


def format_size(num_bytes: int) -> str:
    """Return `num_bytes` in the largest unit of which it is one or more: "512 B", "43.1 MiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
