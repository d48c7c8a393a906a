"""Optimizers that don't bring torch's compiler along.

torch tells its compiler to leave an optimizer's methods alone, and imports all of it to do so when the first of them is
called: 3.6 of the 8.3 s of CPU time that a training process needed before its first step (torch 2.15). What is compiled
here is the network with its loss; no optimizer is ever called from within it, so that nothing need be told.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch._compile
from torch.optim import Optimizer

# What torch looks for before it imports its compiler.
_KNOWN = "__dynamo_disable"


def leave_compiler_out() -> None:
    """Let the marked methods of optimizers run as they are; where torch marks none in this way, nothing happens."""
    for method in _marked():
        setattr(method, _KNOWN, method)


def take_step(optimizer: Optimizer) -> None:
    """Do what `optimizer.step()` does, but for its hooks, of which there are none."""
    plain: Any = inspect.unwrap(type(optimizer).step)
    with torch.no_grad():
        plain(optimizer)


def _marked() -> Iterator[Any]:
    for method in vars(Optimizer).values():
        code = getattr(method, "__code__", None)
        if code is not None and code.co_filename == torch._compile.__file__:
            yield method.__wrapped__
