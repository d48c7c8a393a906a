"""Dummy images: random pixels as an ordinary image dataset, to try and time training where no data is at hand."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tandem.data.manifest import ClassName, ImageDataset
from tandem.data.prepare.image_dataset import ImageJob
from tandem.data.prepare.image_writer import Item
from tandem.data.prepare.staging import Preparation
from tandem.data.progress import Progress, Silent
from tandem.errors import InvalidRequest
from tandem.volume import Volume

DEFAULT_NAME = "dummy"
DEFAULT_CLASSES, DEFAULT_IMAGES, DEFAULT_VAL_IMAGES, DEFAULT_IMAGE_SIZE = 10, 1000, 200, 64
SMALLEST_SIDE, LARGEST_SIDE = 8, 1024

# Of 256: how much of a pixel is the colour of its class; the rest is noise.
_COLOUR_SHARE = 32


def prepare_dummy(
    volume: Volume,
    name: str = DEFAULT_NAME,
    *,
    num_classes: int = DEFAULT_CLASSES,
    num_images: int = DEFAULT_IMAGES,
    num_val_images: int = DEFAULT_VAL_IMAGES,
    image_size: int = DEFAULT_IMAGE_SIZE,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> ImageDataset:
    """Make `num_images` train and `num_val_images` val images of `image_size` pixels a side; return the manifest.

    Each class gets as many as any other, give or take one; what comes out is a function of the values alone.
    Raises InvalidRequest for values that give no dataset, and what `Preparation.run` does.
    """
    recipe = Dummy(num_classes, num_images, num_val_images, image_size, seed)
    return Preparation(volume, name, None, recipe, ImageDataset, force, progress or Silent()).run()


@dataclass(frozen=True)
class Dummy:
    """The recipe; see `prepare_dummy`."""

    num_classes: int
    num_images: int
    num_val_images: int
    image_size: int
    seed: int
    name: str = "dummy"

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise InvalidRequest(f"{self.num_classes} classes; a classifier needs at least 2", "classes")
        if self.num_images < self.num_classes:
            raise InvalidRequest(f"{self.num_images} images can't fill {self.num_classes} classes", "images")
        if self.num_val_images < 1:
            raise InvalidRequest(f"{self.num_val_images} val images; at least 1 is needed", "val_images")
        if not SMALLEST_SIDE <= self.image_size <= LARGEST_SIDE:
            raise InvalidRequest(f"image size {self.image_size} is not {SMALLEST_SIDE} to {LARGEST_SIDE}", "image_size")

    @property
    def options(self) -> Mapping[str, int]:
        """What changes the outcome."""
        return {
            "classes": self.num_classes,
            "images": self.num_images,
            "val_images": self.num_val_images,
            "image_size": self.image_size,
            "seed": self.seed,
        }

    def open(self, path: Path, progress: Progress) -> ImageJob:  # noqa: ARG002 there is no source to look through
        """Return what to make."""
        names = [f"class_{label:04d}" for label in range(self.num_classes)]
        splits = {
            split: [self._item(split, names, row, count) for row in range(count)]
            for split, count in (("train", self.num_images), ("val", self.num_val_images))
        }
        source = RandomImages(path, self.image_size, self.seed)
        return ImageJob(source, tuple(ClassName(id=name, words=name) for name in names), splits, stamps={})

    def _item(self, split: str, names: list[str], row: int, count: int) -> Item:
        # In order of label, as every index is; where there are fewer images than classes, spread over the classes.
        label = row * self.num_classes // count
        return Item(f"{split}/{names[label]}/{row:07d}.png", f"{split}/{names[label]}", f"{row:07d}.png", label)


@dataclass(frozen=True)
class RandomImages:
    """PNGs by names like `train/class_0003/0000042.png`: each a function of the seed and its name."""

    path: Path
    image_size: int
    seed: int

    def read(self, name: str) -> bytes:
        """Return image `name`: noise, an eighth of it given to a colour that depends on the class alone."""
        class_name = name.split("/")[1]
        shape = (self.image_size, self.image_size, 3)
        noise = self._random(name, 3 * self.image_size**2).reshape(shape).astype(np.uint16)
        colour = self._random(class_name, 3).astype(np.uint16)
        pixels = (noise * (256 - _COLOUR_SHARE) + colour * _COLOUR_SHARE) >> 8
        output = io.BytesIO()
        # Noise does not compress; stored, the bytes are those of any version of zlib.
        Image.fromarray(pixels.astype(np.uint8)).save(output, "PNG", compress_level=0)
        return output.getvalue()

    def _random(self, name: str, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        # A hash and no generator of numpy: those may give other numbers in another version.
        data = hashlib.shake_256(f"{self.seed}/{name}".encode()).digest(count)
        return np.frombuffer(data, dtype=np.uint8)
