"""Encoded images without torch: what is read at all, and how small a person may see them."""

import io
import warnings

import numpy as np
from PIL import Image

from tandem.data.jpeg import has_more_scans
from tandem.errors import InvalidImage
from tandem.wire.limits import MAX_PIXELS, MAX_SCANS

# PIL knows many more, and hands some of them (EPS) to other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# Of a page or an answer that holds hundreds: 500 of 64 KiB are 32 MiB.
SMALL_BYTES = 64 * 1024
SMALL_SIDE = 256

# PIL's own warning about size: the limit is enforced. Once for the process, since `catch_warnings` in threads that
# decode at the same time would mix up each other's filters.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an image of which the header alone is read; raise InvalidImage for what is none, or over a limit."""
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidImage(f"the image has {width}×{height} pixels; the limit is {max_pixels:,} in all")
    if image.format == "JPEG" and has_more_scans(data, MAX_SCANS):
        raise InvalidImage(f"the JPEG image has more than {MAX_SCANS} scans")
    return image


def _open(data: bytes) -> Image.Image:
    if not data:
        raise InvalidImage("the image is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise InvalidImage(f"the image has far more pixels than the limit of {MAX_PIXELS:,} in all") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidImage("not an image that can be read: give JPEG, PNG, WebP, BMP or GIF") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image, decoded, with three channels of eight bits; transparency is dropped."""
    if image.mode.startswith(("I", "F")):
        # 16-bit grey: PIL's conversion to RGB would clip at 255, so the range is scaled first.
        grey = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def small(data: bytes) -> bytes:
    """Return an encoded image as it is up to 64 KiB, else as a JPEG of at most 256 pixels a side.

    Raises InvalidImage where that does not decode.
    """
    if len(data) <= SMALL_BYTES:
        return data
    image = open_image(data)
    try:
        # Of a JPEG: decoded at a half, a quarter or an eighth of its size.
        image.draft("RGB", (SMALL_SIDE, SMALL_SIDE))
        image = to_rgb(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidImage(f"the {image.format} image does not decode; it is truncated or damaged") from error
    image.thumbnail((SMALL_SIDE, SMALL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
