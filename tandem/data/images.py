"""Image bytes to pixels: decoding, and the one transform that evaluation and serving share."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tandem.checkpoints.card import Preprocessing
from tandem.data.encoded import open_image, to_rgb
from tandem.data.raw_image import RawImage
from tandem.errors import InvalidImage
from tandem.vision import ImageReadMode
from tandem.vision import decode_image as torchvision_decode
from tandem.vision import functional as transforms
from tandem.wire.limits import MAX_PIXELS

# Formats that torchvision decodes itself, about twice as fast as PIL; the others go through PIL. Not PNG: torchvision's
# decoder crashes the process on damaged bytes (0.29, one in a hundred with six bytes changed; JPEG and WebP survived
# 12,000 of those each).
_DIRECT = {"JPEG", "WEBP"}
# Modes that have just the three channels of eight bits, or one of them; others need PIL's conversion.
_DIRECT_MODES = {"RGB", "L", "P", "RGBA", "1"}
# Of an image many times longer than wide only the middle is resized: the ends are cut off afterwards anyway, and a
# line of 60,000 × 1 pixels would take 100 MB on the way to 24 × 24.
_LONGEST = 8


def to_pixels(image: bytes | RawImage, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return the pixels of an image, encoded or raw, as uint8 (3, H, W); raise InvalidImage."""
    return raw_pixels(image, max_pixels) if isinstance(image, RawImage) else decode_image(image, max_pixels)


def raw_pixels(image: RawImage, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return the pixels of `image` as uint8 (3, H, W); raise InvalidImage where its bytes are not those of its size."""
    width, height = image.width, image.height
    if width < 1 or height < 1:
        raise InvalidImage(f"the raw image has {width}×{height} pixels; width and height must be 1 or above")
    if width * height > max_pixels:
        raise InvalidImage(f"the image has {width}×{height} pixels; the limit is {max_pixels:,} in all")
    if len(image.rgb) != 3 * width * height:
        raise InvalidImage(
            f"the raw image has {len(image.rgb):,} bytes; {width}×{height} pixels of RGB are {3 * width * height:,}"
        )
    pixels = np.frombuffer(image.rgb, np.uint8).reshape(height, width, 3)
    # A copy, channels first: a tensor must not share the memory of bytes.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return the pixels of an encoded image as uint8 (3, H, W).

    One-channel images are repeated, transparency is dropped. The header is read first, so that an image over
    `max_pixels` is refused before it takes memory. Raises InvalidImage.
    """
    image = open_image(data, max_pixels)
    try:
        if image.format in _DIRECT and image.mode in _DIRECT_MODES and not _is_animated(image):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels: Tensor = torchvision_decode(encoded, ImageReadMode.RGB)
            return pixels
        return _through_pil(image)
    except (RuntimeError, OSError, SyntaxError, ValueError) as error:
        raise InvalidImage(f"the {image.format} image does not decode; it is truncated or damaged") from error


def _is_animated(image: Image.Image) -> bool:
    return bool(getattr(image, "is_animated", False))


def _through_pil(image: Image.Image) -> Tensor:
    pixels = np.array(to_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def resize_and_crop(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return uint8 (…, 3, S, S): the shorter side resized to `resize`, the centre cut out.

    Images that have the size already are returned as they are; others as memory of their own.
    """
    size, resize = preprocessing.image_size, preprocessing.resize
    if min(pixels.shape[-2:]) != resize:
        longest = max(_LONGEST, 2 * size / resize)
        pixels = transforms.resize(_shortened(pixels, longest), [resize], antialias=True)
    if tuple(pixels.shape[-2:]) != (size, size):
        # What is cut out is a view: without the copy it would keep the whole picture in memory.
        pixels = transforms.center_crop(pixels, [size, size]).contiguous()
    return pixels


def _shortened(pixels: Tensor, longest: float) -> Tensor:
    """Return the middle of an image longer than `longest` times its shorter side; others as they are."""
    for dimension in (-2, -1):
        length, keep = pixels.shape[dimension], math.ceil(longest * min(pixels.shape[-2:]))
        if length > keep:
            # As much from either end, so that the centre stays where it is.
            cut = (length - keep) // 2
            return pixels.narrow(dimension, cut, length - 2 * cut)
    return pixels


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return float32 (B, 3, S, S): pixels scaled to 0…1, then to the mean and deviation of the preprocessing."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device).view(1, 3, 1, 1)
    deviation = torch.tensor(preprocessing.std, device=pixels.device).view(1, 3, 1, 1)
    # One multiply-add for each pixel: (x / 255 - mean) / deviation.
    return pixels.float().mul_(1 / (255 * deviation)).sub_(mean / deviation)
