"""A text split as training reads it: columns of a long row of token ids, cut into windows."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tandem.errors import DatasetNotFound, TrainingFailed


def load_tokens(directory: Path, split: str, limit: int | None = None) -> Tensor:
    """Return the token ids of a split, int32 (N,), the first `limit` of them; raise DatasetNotFound.

    They stay mapped into memory, and are read as they are used.
    """
    path = directory / "tokens" / f"{split}.npy"
    if not path.is_file():
        raise DatasetNotFound(f"dataset {directory.name!r} has no split {split!r}")
    # Copied where written to, as nobody does: torch has no read-only tensors.
    return torch.from_numpy(np.load(path, mmap_mode="c")[:limit])


def columns(tokens: Tensor, batch_size: int) -> Tensor:
    """Return tokens (N,) as `batch_size` consecutive parts of equal length, (B, N // B); the remainder is dropped.

    Raises TrainingFailed where the text is too short for at least two tokens a part.
    """
    length = len(tokens) // batch_size
    if length < 2:
        raise TrainingFailed(
            f"the text has {len(tokens)} tokens, too few for a batch of {batch_size}; lower --batch-size"
        )
    return tokens[: length * batch_size].view(batch_size, length)


def num_windows(length: int, bptt: int) -> int:
    """Return how many windows of at most `bptt` targets a row of `length` tokens gives."""
    return -(-(length - 1) // bptt)


def window(rows: Tensor, number: int, bptt: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, int64 (B, T), of window `number`; targets are the inputs one token on, T ≤ bptt."""
    first = number * bptt
    return span(rows, first, min(first + bptt, rows.shape[1] - 1))


def span(rows: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return the inputs from `first` up to `last`, and their targets, both int64 (B, last - first)."""
    return rows[:, first:last].long(), rows[:, first + 1 : last + 1].long()


def windows(rows: Tensor, bptt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all windows of `rows`, in order."""
    for number in range(num_windows(rows.shape[1], bptt)):
        yield window(rows, number, bptt)
