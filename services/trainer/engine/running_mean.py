"""Averaged SGD: the mean of a network's weights since training stopped improving (Polyak and Juditsky 1992)."""

import copy
from collections.abc import Sequence

import torch
from torch import nn


class RunningMean:
    """A copy of `network` that holds the mean of its weights over the updates since this was made."""

    def __init__(self, network: nn.Module, num_updates: int = 0) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.num_updates = num_updates
        self._means = [each.detach() for each in self.network.parameters()]
        self._weights = [each.detach() for each in network.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an update."""
        self.num_updates += 1
        torch._foreach_lerp_(self._means, self._weights, 1 / self.num_updates)


def is_stuck(losses: Sequence[float], patience: int) -> bool:
    """Return whether the last of `losses` is above the best of those more than `patience` evaluations before it.

    The non-monotonic trigger of Merity, Keskar and Socher 2018 (algorithm 1), at the end of each epoch.
    """
    return len(losses) > patience + 1 and losses[-1] > min(losses[: -patience - 1])
