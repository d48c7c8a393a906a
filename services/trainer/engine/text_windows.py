"""Where the windows of an epoch begin: at even distances, or at random ones as AWD-LSTM is trained."""

import torch
from torch import Generator

from tandem.data.corpus import num_windows

# Merity et al. 2018, section 5: as a rule about as long as bptt, now and then about half of it.
_USUAL, _SPREAD = 0.95, 5.0


def window_bounds(length: int, bptt: int, randomness: Generator | None = None) -> list[int]:
    """Return the first input of each window of a row of `length` tokens, and the end: numbers from 0 to length - 1.

    With `randomness` the lengths vary about `bptt`; there are as many windows as without, so that an epoch has the
    same number of steps each time.
    """
    count, end = num_windows(length, bptt), length - 1
    if randomness is None:
        return [*range(0, count * bptt, bptt), end]
    usual = torch.rand(count, generator=randomness) < _USUAL
    means = torch.where(usual, float(bptt), bptt / 2)
    spread = min(_SPREAD, bptt / 4)
    lengths = (means + spread * torch.randn(count, generator=randomness)).clamp(min=max(bptt / 8, 1.0)).double()
    ends = (lengths.cumsum(0) / lengths.sum() * end).round().long().tolist()
    # Each at least one token long, also where a short text leaves rounding little room.
    bounds = [0]
    for number, bound in enumerate(ends, 1):
        bounds.append(min(max(bound, bounds[-1] + 1), end - (count - number)))
    return bounds
