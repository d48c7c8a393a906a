"""Randomness as a function of what it is for: equal for a run that was interrupted and one that was not."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` (seed, purpose, epoch, step …) and on nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `parts`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
