"""What is put around a network for a training step: the exchange of gradients, and the compiler."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from services.trainer.engine.ranks import Ranks
from tandem.jobs.spec import ClassifierJob


def wrapped(network: nn.Module, spec: ClassifierJob, image_size: int, ranks: Ranks) -> Any:
    """Return what is called in a step: the network itself, compiled, or with its gradients averaged over processes.

    `image_size` is a side that the network can take.
    """
    images = torch.zeros(2, 3, image_size, image_size, device=next(network.parameters()).device)
    forward = exchanging(network, ranks, lambda forward: forward(images).sum())
    return compiled(forward) if spec.compile else forward


def compiled(function: Any) -> Any:
    """Return `function` compiled, each shape of its inputs by itself.

    A kernel for any shape would depend on which came first, and a run that was resumed meets them in another order.
    """
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def exchanging(module: nn.Module, ranks: Ranks, example_loss: Callable[[Any], Tensor]) -> Any:
    """Return `module` with its gradients averaged over processes: itself where there is one process.

    `example_loss` calls what it is given on some example, and returns a scalar to differentiate.
    """
    if ranks.size == 1:
        return module
    forward = DistributedDataParallel(module)
    _settle_buckets(forward, example_loss)
    return forward


def _settle_buckets(forward: DistributedDataParallel, example_loss: Callable[[Any], Tensor]) -> None:
    """Pass an example through and back, and leave no trace of it but the order of the gradients.

    After its first step DistributedDataParallel arranges them anew, in the order in which they come, and with it the
    order in which the processes' gradients are added up. A resumed run would be a step behind in that.
    """
    before = {name: buffer.clone() for name, buffer in forward.module.named_buffers()}
    # The second pass begins with the new arrangement.
    for _ in range(2):
        example_loss(forward).backward()  # type: ignore[no-untyped-call]
        forward.zero_grad(set_to_none=True)
    for name, buffer in forward.module.named_buffers():
        buffer.copy_(before[name])
