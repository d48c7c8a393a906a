"""Whether an exported program does what the network does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.errors import ExportFailed

# Images float32 (B, 3, S, S) → logits float32 (B, C).
Predict = Callable[[Tensor], Tensor]

# Of the largest absolute logit; docs/decisions/0007-export.md has the measurements it lies between.
TOLERANCE = 1e-4
# Two classes nearer to each other than this, of the same, are a tie: float rounding decides which is first.
TIE = 5e-5


@dataclass(frozen=True)
class Agreement:
    """How near an exported program is to the network; see ExportReport for the fields."""

    num_images: int
    batch_sizes: tuple[int, ...]
    max_difference: float
    relative_difference: float
    num_ties: int


@dataclass(frozen=True)
class _Pass:
    """All images once, in batches of `batch_size`: logits (N, C) of the network and of the exported program."""

    batch_size: int
    expected: Tensor
    got: Tensor


def check(network: Predict, exported: Predict, images: Tensor, batch_size: int) -> Agreement:
    """Run both on `images` (N, 3, S, S), one by one and in batches of `batch_size`, and compare.

    Fewer images than `batch_size` are repeated to fill one batch, so that more than one size is always run. Raises
    ExportFailed where logits differ by more than TOLERANCE of their scale, or a best class differs that is no tie.
    """
    passes = [_run(network, exported, images, size) for size in (1, max(batch_size, 2))]
    scale = max(float(each.expected.abs().max()) for each in passes)
    largest = max(float((each.got - each.expected).abs().max()) for each in passes)
    if scale == 0:
        # A head that starts at zero and was never trained (torchvision's vit_b_16): every program would pass.
        raise ExportFailed("the network's logits are zero for every image: nothing can be checked; train it first")
    relative = largest / scale
    if relative > TOLERANCE:
        raise ExportFailed(
            f"the exported file is not the network: logits differ by up to {largest:.2g}, "
            f"{relative:.1e} of their scale (allowed: {TOLERANCE:.0e}); nothing was written"
        )
    ties = max(_count_ties(each, scale, len(images)) for each in passes)
    return Agreement(len(images), tuple(each.batch_size for each in passes), largest, relative, ties)


def _run(network: Predict, exported: Predict, images: Tensor, batch_size: int) -> _Pass:
    expected, got = [], []
    for batch in _batches(images, batch_size):
        expected.append(network(batch))
        got.append(exported(batch))
        if got[-1].shape != expected[-1].shape:
            shapes = f"{tuple(got[-1].shape)}, not {tuple(expected[-1].shape)}"
            raise ExportFailed(f"the exported file is not the network: its logits have the shape {shapes}")
    result = _Pass(batch_size, torch.cat(expected), torch.cat(got))
    for who, logits in (("the network's", result.expected), ("the exported file's", result.got)):
        if not bool(logits.isfinite().all()):
            raise ExportFailed(f"{who} logits are not finite at batch size {batch_size}; nothing was written")
    return result


def _batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    rows = torch.arange(max(len(images), batch_size)) % len(images)
    for first in range(0, len(rows), batch_size):
        yield images[rows[first : first + batch_size]]


def _count_ties(each: _Pass, scale: float, num_images: int) -> int:
    """Return how many images have a tie for their best class; raise ExportFailed where another one's best differs."""
    best = each.expected.topk(min(2, each.expected.shape[1]), dim=1).values
    # Rows beyond are images once more, to fill a batch.
    is_tie = (best[:, 0] - best[:, -1] <= TIE * scale)[:num_images]
    differs = (each.expected.argmax(1) != each.got.argmax(1))[:num_images] & ~is_tie
    if bool(differs.any()):
        raise ExportFailed(
            f"the exported file is not the network: {int(differs.sum())} of {len(differs)} images get another best "
            f"class at batch size {each.batch_size}; nothing was written"
        )
    return int(is_tie.sum())
