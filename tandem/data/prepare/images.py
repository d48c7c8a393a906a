"""One image of a source: checked by decoding it, and rewritten as three-channel only where it has to be."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from tandem.data.prepare.sources import reason
from tandem.errors import BadSource

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# The limit of `tandem.data.images.decode_image`, which reads these files later (and can't be imported here: torch).
MAX_PIXELS = 50_000_000

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# What training and serving decode directly.
_KEPT_FORMATS = frozenset({"JPEG", "PNG", "WEBP"})
_JPEG_MAGIC = b"\xff\xd8\xff"
_REMEDY = "replace it, or remove it from the source"


@dataclass(frozen=True)
class PreparedImage:
    """A three-channel image file: its bytes, and the decoded picture.

    `suffix` is to be added to the source's file name where the format has changed; `converted` says that the bytes are
    not the source's.
    """

    data: bytes
    image: Image.Image
    suffix: str = ""
    converted: bool = False

    @property
    def height_width(self) -> tuple[int, int]:
        """Size in pixels."""
        return self.image.height, self.image.width

    def pixels(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Return the pixels as uint8 (3, H, W)."""
        height, width = self.height_width
        # PIL parts each line into its three channels, so that only runs of W bytes are left to transpose: 10 µs into a
        # row of 64×64, and 13 by way of np.asarray.
        lines = np.frombuffer(self.image.tobytes("raw", "RGB;L"), dtype=np.uint8)
        return lines.reshape(height, 3, width).transpose(1, 0, 2)


def is_image_name(name: str) -> bool:
    """Return whether a file name ends like an image, in either case."""
    return name[name.rfind(".") :].lower() in EXTENSIONS


def prepare_image(data: bytes, name: str) -> PreparedImage:
    """Return image `name` as a three-channel file; the bytes stay as they are where they are one already.

    One-channel JPEGs become three-channel JPEGs; everything else that is not plain RGB (palette, alpha, CMYK, 16-bit,
    animated, BMP, TIFF) becomes a PNG, of the first frame. Raises BadSource for bytes that don't decode. PIL's
    warnings are the caller's to silence (`without_warnings`): once for many images.
    """
    if not data:
        raise BadSource(f"{name} does not decode: the file is empty; {_REMEDY}")
    try:
        return _prepare(data, name)
    except BadSource:
        raise
    except Image.DecompressionBombError as error:
        raise BadSource(f"{name} has far too many pixels; the limit is {MAX_PIXELS:,}") from error
    except UnidentifiedImageError as error:
        raise BadSource(f"{name} does not decode: it is no image of a known format; {_REMEDY}") from error
    except Exception as error:  # for damaged bytes PIL raises nearly everything there is
        raise BadSource(f"{name} does not decode ({reason(error)}): it is damaged or truncated; {_REMEDY}") from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence PIL in this block: it warns of odd metadata, no one's concern here, and of size, which is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _prepare(data: bytes, name: str) -> PreparedImage:
    image, is_deep = _decode(data, name)
    if _is_plain(image, is_deep):
        return PreparedImage(data, image)
    if image.format == "JPEG" and image.mode == "L":
        converted = _grey_jpeg_to_rgb(image)
        return PreparedImage(converted, _decode(converted, name)[0], converted=True)
    rgb = _to_rgb(image)
    return PreparedImage(_png(rgb), rgb, "" if name.lower().endswith(".png") else ".png", converted=True)


def _decode(data: bytes, name: str) -> tuple[Image.Image, bool]:
    """Return the decoded picture and whether its channels have 16 bits."""
    image = _open(data)
    if image.width * image.height > MAX_PIXELS:
        raise BadSource(f"{name} has {image.width}×{image.height} pixels; the limit is {MAX_PIXELS:,} in all")
    # A 16-bit PNG opens as mode RGB; only its tile still tells. load() forgets the tile.
    is_deep = image.format != "JPEG" and ";16" in str(getattr(image, "tile", ""))
    image.load()
    return image, is_deep


def _open(data: bytes) -> Image.Image:
    # Image.open does more than find the format: 18 µs and not 16. A JPEG with a second picture after it (MPO) is one.
    if data.startswith(_JPEG_MAGIC):
        return JpegImageFile(io.BytesIO(data))
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _is_plain(image: Image.Image, is_deep: bool) -> bool:
    if image.mode != "RGB" or image.format not in _KEPT_FORMATS:
        return False
    if image.format == "JPEG":
        return True
    return not is_deep and "transparency" not in image.info and getattr(image, "n_frames", 1) == 1


def _grey_jpeg_to_rgb(image: Image.Image) -> bytes:
    """Return a one-channel JPEG as a three-channel one, at the quality that keeps its pixels nearest.

    On the 168 one-channel val images of Tiny-ImageNet the pixels change by 0.06 of 255 on average and 1 at most, for
    3.9 kB a file; with the table the source was made with they change by 0.15 and 13, for 1.9 kB.
    """
    output = io.BytesIO()
    image.convert("RGB").save(output, "JPEG", quality=100, subsampling=0)
    return output.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # More than 8 bits of grey: PIL would clip at 255, so the range is scaled first, as decode_image does.
        grey = np.asarray(image, dtype=np.float64)
        grey = grey / (65535 if grey.max(initial=0) > 255 else 255) * 255
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _png(image: Image.Image) -> bytes:
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()
