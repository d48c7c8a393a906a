"""Cross-entropy straight from the features before the head: one operation with a gradient of its own.

With 33,278 words the logits of a window of 20 × 35 tokens are 93 MB, and torch's log-softmax, loss and their backward
passes each read and write that much, in memory that is new each time. Here the head, the softmax and the gradient,
which is softmax − one-hot, are taken a few rows at a time and in place; what stays until the backward pass is one array
of that size, in the precision of the head. The idea is that of Liger's fused linear cross-entropy and of cut
cross-entropy (Wijmans et al. 2025).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# On a CPU few enough for its cache (17 MB of float32 with 33,278 words), on a GPU as many as keep it busy.
_ROWS, _MANY_ROWS = 128, 2048


def output_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the losses summed, float32 (), in nats, of features (N, H) against targets (N,), int64.

    The head, weight (V, H) and bias (V,), is computed in `dtype`, softmax and loss in float32. It can be
    differentiated once, by hidden, weight and bias.
    """
    # What a user's autocast would do to the head is said by `dtype`.
    with torch.autocast(hidden.device.type, enabled=False):
        losses: Tensor = _OutputLoss.apply(hidden, weight, bias, targets, dtype)
    return losses


def output_losses(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the loss of each token, float32 (N,), in nats; as `output_loss`, without a gradient."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _run(hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, keeps_slopes=False)[0]


def _run(
    features: Tensor, matrix: Tensor, offset: Tensor, targets: Tensor, keeps_slopes: bool
) -> tuple[Tensor, Tensor]:
    """Return the losses (N,) and, where they are kept, their gradients by the logits, (N, V)."""
    num_rows = min(_ROWS if features.device.type == "cpu" else _MANY_ROWS, len(targets))
    slopes = features.new_empty(len(targets) if keeps_slopes else num_rows, len(matrix))
    work = features.new_empty(num_rows, len(matrix), dtype=torch.float32)
    losses = features.new_empty(len(targets), dtype=torch.float32)
    for first in range(0, len(targets), num_rows):
        wanted = targets[first : first + num_rows, None]
        place = slopes[first : first + num_rows] if keeps_slopes else slopes[: len(wanted)]
        torch.addmm(offset, features[first : first + num_rows], matrix.T, out=place)
        # A softmax in place needs float32 to be in place in.
        chances = place if place.dtype == torch.float32 else work[: len(wanted)].copy_(place)
        at_target, largest = chances.gather(1, wanted), chances.amax(1, keepdim=True)
        torch.softmax(chances, 1, out=chances)
        # The normaliser's logarithm, by way of the likeliest word: exp is not computed twice.
        normaliser = largest - chances.amax(1, keepdim=True).log()
        losses[first : first + num_rows] = (normaliser - at_target).squeeze(1)
        if keeps_slopes:
            chances.scatter_add_(1, wanted, chances.new_full(wanted.shape, -1.0))
            place.copy_(chances)
    return losses, slopes


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        features, matrix = hidden.to(dtype), weight.to(dtype)
        losses, slopes = _run(features, matrix, bias.to(dtype), targets, any(ctx.needs_input_grad))
        ctx.save_for_backward(features, matrix, slopes)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, matrix, slopes = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        with torch.autocast(features.device.type, enabled=False):
            by_hidden = (slopes @ matrix).to(hidden_dtype) * gradient
            by_weight = (slopes.T @ features).to(weight_dtype).mul_(gradient)
            # As a product: a sum over rows takes 47 ms where this takes 3.
            by_bias = (slopes.new_ones(1, len(slopes)) @ slopes).squeeze(0).to(bias_dtype).mul_(gradient)
        return by_hidden, by_weight, by_bias, None, None
