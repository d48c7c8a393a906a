"""A network with its preprocessing in front, and the sizes of batches that a runtime is made ready for."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.checkpoints.card import Preprocessing


class FromPixels(nn.Module):
    """Takes pixels as they are decoded, so that a compiler sees the normalisation too. `network` is in `dtype`."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        mean, deviation = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * deviation)).view(1, 3, 1, 1))
        self.register_buffer("shift", (mean / deviation).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits float32 (B, C) for pixels uint8 (B, 3, S, S), normalised as tandem.data.images does it."""
        images = pixels.float() * self.scale - self.shift
        logits: Tensor = self.network(images.to(self.dtype))
        return logits.float()


def in_buckets(pixels: Tensor, sizes: Sequence[int], run: Callable[[Tensor], Tensor]) -> Tensor:
    """Return run's logits (B, C) for pixels (B, 3, S, S) of any B ≥ 1; `run` gets batches of `sizes` (ascending).

    The last piece is filled up with black images to the next size.
    """
    return torch.cat([_padded(piece, sizes, run) for piece in torch.split(pixels, sizes[-1])])


def _padded(pixels: Tensor, sizes: Sequence[int], run: Callable[[Tensor], Tensor]) -> Tensor:
    num_images = pixels.shape[0]
    size = next(size for size in sizes if size >= num_images)
    if size > num_images:
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, size - num_images))
    return run(pixels)[:num_images]
