"""Augmentation of whole batches, on any device: crop, flip and resize as two matrix products.

Cutting a box out of an image and resizing it is linear and separable: `rows @ image @ columns`, where each line of
`rows` and `columns` holds the weights with which one output pixel takes the input's. With weights of their own for each
image, a whole batch is cropped, mirrored and resized at once, antialiased, with no loop. torchvision's transforms draw
one box for a whole batch; they serve where images are augmented one by one (`tandem.data.single_images`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tandem.checkpoints.card import Preprocessing
from tandem.data.images import resize_and_crop

# Small images are as large as the objects in them: they are padded by an eighth and cut anywhere, as is usual for them.
PADDING_SHARE = 8
# Sides of a random part are between 3:4 and 4:3 (Szegedy et al. 2014), as torchvision's.
MAX_RATIO = 4 / 3
_NUM_DRAWS = 5


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed; the strengths are those of `tandem.jobs.spec.ClassifierJob`."""

    crop: Literal["shift", "resized", "none"]
    flip: bool
    min_crop_area: float = 0.25
    color_jitter: float = 0.0
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    random_erasing: float = 0.0


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Return (count, 5) numbers in [0, 1): all the randomness that `augment_batch` uses for each image."""
    return torch.rand(count, _NUM_DRAWS, generator=generator)


def augment_batch(
    pixels: Tensor, draws: Tensor, augmentation: Augmentation, preprocessing: Preprocessing, size: int
) -> Tensor:
    """Return (B, 3, size, size) for pixels uint8 (B, 3, H, W): float32 of 0…255, or uint8 where nothing is resampled.

    `draws` (B, 5) lie on the device of `pixels`. Without a crop, training sees just what evaluation sees.
    """
    mirrored = (draws[:, 4] < 0.5) if augmentation.flip else None
    if augmentation.crop == "none":
        plain = resize_and_crop(pixels, preprocessing.at_size(size))
        return plain if mirrored is None else torch.where(mirrored[:, None, None, None], plain.flip(-1), plain)
    full_height, full_width = pixels.shape[-2:]
    if augmentation.crop == "shift":
        side = min(full_height, full_width) * preprocessing.image_size / preprocessing.resize
        pad = max(int(side) // PADDING_SHARE, 1)
        top, left, height, width = _shifted(draws, full_height, full_width, side, pad)
    else:
        pad = 0
        top, left, height, width = _random_parts(draws, full_height, full_width, augmentation.min_crop_area)
    rows = _weights(top, height, full_height, size, pad)
    columns = _weights(left, width, full_width, size, pad)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    return _resampled(pixels, rows, columns)


Boxes = tuple[Tensor, Tensor, Tensor, Tensor]


def _shifted(draws: Tensor, height: int, width: int, side: float, pad: int) -> Boxes:
    """Return the middle square of `side` pixels, moved by up to `pad` whole pixels either way."""
    down, right = ((draws[:, column] * (2 * pad + 1)).floor() - pad for column in (0, 1))
    sides = torch.full_like(down, side)
    return down + (height - side) / 2, right + (width - side) / 2, sides, sides


def _random_parts(draws: Tensor, height: int, width: int, min_area: float) -> Boxes:
    """Return random parts of `min_area` (a share) to all of the image, in whole pixels.

    As torchvision's RandomResizedCrop, except that a part that would be too long is cut short, not drawn again.
    """
    area = height * width * (min_area + (1 - min_area) * draws[:, 0])
    ratio = MAX_RATIO ** (2 * draws[:, 1] - 1)
    part_height = (area / ratio).sqrt().round().clamp(1, height)
    part_width = (area * ratio).sqrt().round().clamp(1, width)
    top = (draws[:, 2] * (height - part_height + 1)).floor()
    left = (draws[:, 3] * (width - part_width + 1)).floor()
    return top, left, part_height, part_width


def _resampled(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return float32 (B, 3, h, w): `rows` (B, h, H) @ pixels (B, 3, H, W) @ `columns` (B, w, W), transposed."""
    batch, channels, height, width = pixels.shape
    # Heights first and channels beside the widths: then each product is one large matrix an image.
    by_height = pixels.permute(0, 2, 1, 3).reshape(batch, height * channels, width).float()
    narrow = torch.bmm(by_height, columns.transpose(1, 2)).view(batch, height, -1)
    result = torch.bmm(rows, narrow)
    return result.view(batch, rows.shape[1], channels, -1).permute(0, 2, 1, 3)


def _weights(start: Tensor, length: Tensor, num_in: int, num_out: int, pad: int = 0) -> Tensor:
    """Return (B, num_out, num_in): the antialiased bilinear weights that resize [start, start + length) to num_out.

    The part may reach up to `pad` over the edges, where the image goes on as its mirror image.
    """
    scale = length[:, None] / num_out
    centre = start[:, None] + (torch.arange(num_out, device=start.device) + 0.5) * scale - 0.5
    taps = torch.arange(-pad, num_in + pad, device=start.device)
    weights = 1 - (taps - centre[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]
    # As if the part had been cut out before it was resized: nothing from beyond its edges comes in.
    inside = (taps >= start[:, None]) & (taps < (start + length)[:, None])
    weights = weights.clamp_(min=0) * inside[:, None]
    weights /= weights.sum(-1, keepdim=True)
    if not pad:
        return weights
    within = weights[:, :, pad : pad + num_in].contiguous()
    within[:, :, 1 : pad + 1] += weights[:, :, :pad].flip(-1)
    within[:, :, num_in - 1 - pad : num_in - 1] += weights[:, :, pad + num_in :].flip(-1)
    return within
