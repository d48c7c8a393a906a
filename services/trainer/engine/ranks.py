"""The processes of one training run: how they share the work, and what they must agree on.

One process alone is a group of size 1, for which everything here is free.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `size`; `control` is a gloo group for decisions, which never wait for a GPU."""

    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def is_first(self) -> bool:
        """True for the process that writes and reports."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of `rows` (N,): each size-th, so that all parts together are `rows`."""
        return rows[self.rank :: self.size]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all processes; each must call this."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.any(False)

    def any(self, *flags: bool) -> list[bool]:
        """Return, for each flag, whether it is set in any process; each must call this."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control)
        return [bool(vote) for vote in votes]

    def copy_from_first(self, network: nn.Module) -> None:
        """Give the buffers of `network` (statistics of batch norms) the values that they have in the first process."""
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    def interleave(self, parts: Tensor, total: int) -> Tensor:
        """Return (total, …) from each process's `parts`, in the order that `share` took apart; on the CPU."""
        if self.size == 1:
            return parts.cpu()
        longest = -(-total // self.size)
        padded = parts.new_zeros((longest, *parts.shape[1:]), device="cpu")
        padded[: len(parts)] = parts.cpu()
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self.control)
        return torch.stack(gathered, 1).flatten(0, 1)[:total]


ALONE = Ranks()
