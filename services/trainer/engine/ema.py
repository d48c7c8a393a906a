"""An exponential moving average of a network's weights: what is evaluated, saved and served in its place."""

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """A copy of `network` that follows it: average ← d·average + (1 − d)·weights after each update.

    d rises to `decay` as (1 + n) / (10 + n) over the updates n (Tensorflow's ExponentialMovingAverage), so that a short
    run is not left with its first weights. Buffers (the statistics of batch norms) are averaged too; counters are
    copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._decay = decay
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after update `num_updates` (from 1)."""
        decay = min(self._decay, (1 + num_updates) / (10 + num_updates))
        averages, weights = ([pair[side] for pair in self._averaged] for side in (0, 1))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, value in self._copied:
            average.copy_(value)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*network.parameters(), *network.buffers())]
