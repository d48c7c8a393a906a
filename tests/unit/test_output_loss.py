"""The loss straight from the features is the cross-entropy of the logits, and so is its gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.trainer.engine.output_loss import output_loss, output_losses


def inputs(num_rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, 12, generator=generator, dtype=dtype, requires_grad=True)
    weight = (3 * torch.randn(50, 12, generator=generator)).requires_grad_()
    bias = torch.randn(50, generator=generator).requires_grad_()
    return hidden, weight, bias, torch.randint(50, (num_rows,), generator=generator)


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 300])
def test_value_and_gradients_are_those_of_cross_entropy(num_rows: int) -> None:
    hidden, weight, bias, targets = inputs(num_rows)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    wanted = torch.autograd.grad(0.3 * expected, (hidden, weight, bias))
    loss = output_loss(hidden, weight, bias, targets, torch.float32)
    found = torch.autograd.grad(0.3 * loss, (hidden, weight, bias))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_is_differentiable_where_numbers_say_so() -> None:
    hidden, weight, bias, targets = (
        each.detach()[:7] if number == 0 else each for number, each in enumerate(inputs(7))
    )
    step, direction = 1e-2, torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    hidden.requires_grad_()
    slope = torch.autograd.grad(output_loss(hidden, weight, bias, targets, torch.float32), hidden)[0]
    with torch.no_grad():
        moved = (hidden + step * direction, hidden - step * direction)
        values = [output_loss(each, weight, bias, targets, torch.float32) for each in moved]
    assert float((values[0] - values[1]) / (2 * step)) == pytest.approx(float((slope * direction).sum()), rel=2e-2)


def test_bfloat16_is_near() -> None:
    hidden, weight, bias, targets = inputs(200)
    exact = output_loss(hidden, weight, bias, targets, torch.float32)
    rough = output_loss(hidden, weight, bias, targets, torch.bfloat16)
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    for ours, theirs in zip(
        *(torch.autograd.grad(each, (hidden, weight, bias)) for each in (rough, exact)), strict=True
    ):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.03
        assert ours.dtype == torch.float32


def test_an_autocast_outside_changes_nothing() -> None:
    hidden, weight, bias, targets = inputs(40)
    plain = output_loss(hidden, weight, bias, targets, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(output_loss(hidden, weight, bias, targets, torch.float32), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_losses_of_tokens_sum_to_it(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = inputs(300)
    losses = output_losses(hidden, weight, bias, targets, dtype)
    assert losses.shape == (300,)
    torch.testing.assert_close(losses.sum(), output_loss(hidden, weight, bias, targets, dtype), rtol=1e-5, atol=1e-3)


def test_certainty_neither_overflows_nor_loses_its_sign() -> None:
    weight = torch.zeros(4, 1)
    weight[1] = 1.0
    losses = output_losses(torch.tensor([[1e4], [1e4]]), weight, torch.zeros(4), torch.tensor([1, 0]), torch.float32)
    assert losses.tolist() == [0.0, 1e4]
