"""The state that a language model carries from window to window, of all rows of the batch, as plain tensors.

In training it is held in parts (accumulation) by several processes; in a snapshot it is whole, so that neither number
matters to it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from services.trainer.engine.ranks import Ranks
from tandem.models.language_models import ModelState

_PREFIX = "state/"


def gathered(parts: Sequence[ModelState | None], dimension: int, batch_size: int, ranks: Ranks) -> ModelState:
    """Return the state of all `batch_size` rows, on the CPU, from each process's `parts`; empty before a first window.

    `dimension` is that of the batch. Each process must call this.
    """
    held = [part for part in parts if part is not None]
    if not held:
        return ()
    mine = (torch.cat(tensors, dim=dimension).movedim(dimension, 0) for tensors in zip(*held, strict=True))
    return tuple(ranks.interleave(each.cpu(), batch_size).movedim(0, dimension).contiguous() for each in mine)


def state_tensors(state: ModelState) -> dict[str, Tensor]:
    """Return `state` as tensors with names."""
    return {f"{_PREFIX}{number}": part for number, part in enumerate(state)}


def taken_apart(
    tensors: Mapping[str, Tensor], dimension: int, num_parts: int, ranks: Ranks, device: torch.device
) -> list[ModelState | None]:
    """Return this process's parts of what `state_tensors` returned: the opposite of `gathered`."""
    names = sorted((name for name in tensors if name.startswith(_PREFIX)), key=lambda name: int(name[len(_PREFIX) :]))
    if not names:
        return [None] * num_parts
    mine = [ranks.share(tensors[name].movedim(dimension, 0)) for name in names]
    # Each part by itself: what a network is given must not depend on whether it has been saved.
    split = [
        [part.movedim(0, dimension).contiguous().clone().to(device) for part in each.tensor_split(num_parts)]
        for each in mine
    ]
    return [tuple(part) for part in zip(*split, strict=True)]
