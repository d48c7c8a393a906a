"""What a process needs to start: no compiler where nothing is compiled."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from services.trainer.engine.uncompiled import take_step

# In a process of its own: here something else may have imported it.
TRAIN = """
import torch
from services.trainer.computing import preload
from services.trainer.engine.uncompiled import take_step
preload()
weight = torch.nn.Parameter(torch.ones(2))
for make in (torch.optim.SGD, torch.optim.AdamW):
    optimizer = make([weight], lr=0.1)
    optimizer.zero_grad()
    weight.square().sum().backward()
    take_step(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
"""
CLASSIFY = """
import torch
import services.inference.server
from tandem.vision import functional, models
models.resnet18()(functional.resize(torch.zeros(1, 3, 50, 50), [64]))
"""


@pytest.mark.parametrize("program", [TRAIN, CLASSIFY])
def test_the_compiler_is_not_imported_before_something_is_compiled(program: str) -> None:
    program += "import sys; print('torch._dynamo' in sys.modules)\n"
    program += "torch.compile(torch.sin, backend='eager')(torch.ones(2)); print('torch._dynamo' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout.split(), done.returncode) == (["False", "True"], 0), done.stderr


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_steps_as_it_does_by_itself(make: type[torch.optim.Optimizer]) -> None:
    def weights(advance: Callable[[torch.optim.Optimizer], object]) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = make([weight], lr=0.1)  # type: ignore[call-arg]
        for _ in range(5):
            optimizer.zero_grad()
            weight.pow(3).sum().backward()  # type: ignore[no-untyped-call]
            advance(optimizer)
        return weight.detach()

    assert torch.equal(weights(take_step), weights(lambda optimizer: optimizer.step()))
