"""The running sums of an epoch: they stay on the device, so that no step waits for it."""

import torch
from torch import Tensor


def tally(loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return (4,): the summed loss, the number right at rank 1, at rank 5 (or all classes), and the count.

    Of mixed images the class with the larger share counts as the right one.
    """
    labels = targets.argmax(1) if targets.ndim > 1 else targets
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    total = loss.detach().double()
    return torch.stack((total, ranked[:, 0].sum().double(), ranked.sum().double(), torch.full_like(total, len(labels))))


def tally_metrics(sums: Tensor, learning_rate: float) -> dict[str, float]:
    """Return the mean loss, the accuracies at ranks 1 and 5 in percent, and the learning rate."""
    loss, right1, right5, count = sums.tolist()
    count = max(count, 1.0)
    return {
        "train_loss": loss / count,
        "train_acc1": 100 * right1 / count,
        "train_acc5": 100 * right5 / count,
        "learning_rate": learning_rate,
    }
