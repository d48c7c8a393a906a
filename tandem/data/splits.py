"""Image splits as training and comparison read them: uint8 batches by index, from packed pixels or from files."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from tandem.checkpoints.card import Preprocessing
from tandem.data.images import decode_image, resize_and_crop
from tandem.data.manifest import ImageDataset, read_index, spread
from tandem.errors import InvalidImage, TrainingFailed

# Packed images are as small as objects in them: they are padded by an eighth and cut anywhere, as is usual for them.
_PADDING_SHARE = 8
_FILE_CROP_SCALE = (0.25, 1.0)


class ImageSplit(Protocol):
    """N images with labels; batches are uint8 (B, 3, S, S) on the CPU."""

    labels: Tensor
    files: Sequence[str]

    def train_batch(self, indices: Tensor, generator: torch.Generator, crop: bool, flip: bool) -> Tensor:
        """Return the images `indices` (B,), augmented as `generator` says."""
        ...

    def eval_batch(self, indices: Tensor) -> Tensor:
        """Return the images `indices` (B,), resized and centre-cropped as serving does."""
        ...


def open_split(
    directory: Path, dataset: ImageDataset, split: str, preprocessing: Preprocessing, limit: int | None
) -> ImageSplit:
    """Return split `split` of the dataset in `directory`; with `limit`, that many images spread over the classes."""
    index = read_index(directory, split)
    chosen = spread(len(index), limit)
    files = [index[row][0] for row in chosen]
    labels = torch.tensor([index[row][1] for row in chosen], dtype=torch.int64)
    if dataset.packed:
        pixels = np.load(directory / "packed" / f"{split}.npy", mmap_mode="r")
        return PackedSplit(pixels, torch.tensor(chosen, dtype=torch.int64), labels, files, preprocessing)
    return FileSplit(directory, labels, files, preprocessing)


class PackedSplit:
    """Images of one small size in a memory-mapped array (N, 3, H, W); augmentation acts on whole batches."""

    def __init__(
        self,
        pixels: np.ndarray,
        rows: Tensor,
        labels: Tensor,
        files: Sequence[str],
        preprocessing: Preprocessing,
    ) -> None:
        self._pixels = pixels
        self._rows = rows
        self._preprocessing = preprocessing
        self.labels = labels
        self.files = files

    def train_batch(self, indices: Tensor, generator: torch.Generator, crop: bool, flip: bool) -> Tensor:
        """Return uint8 (B, 3, S, S): padded by reflection and cut at random, half of them mirrored."""
        pixels = self._read(indices)
        if crop:
            pixels = shifted(pixels, generator)
        if flip:
            pixels = mirrored(pixels, generator)
        return resize_and_crop(pixels, self._preprocessing)

    def eval_batch(self, indices: Tensor) -> Tensor:
        """Return uint8 (B, 3, S, S) without augmentation."""
        return resize_and_crop(self._read(indices), self._preprocessing)

    def _read(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(self._pixels[self._rows[indices].numpy()])


class FileSplit:
    """Images of any size in files, decoded for each batch by a pool of threads (the decoders drop the GIL)."""

    def __init__(self, directory: Path, labels: Tensor, files: Sequence[str], preprocessing: Preprocessing) -> None:
        self._directory = directory
        self._preprocessing = preprocessing
        self._pool = ThreadPoolExecutor(thread_name_prefix="decode")
        self.labels = labels
        self.files = files

    def train_batch(self, indices: Tensor, generator: torch.Generator, crop: bool, flip: bool) -> Tensor:
        """Return uint8 (B, 3, S, S): a random part of each image resized to S, half of them mirrored."""
        seeds = torch.randint(2**62, (len(indices),), generator=generator).tolist()
        decode = self._random_part if crop else self._whole
        pixels = torch.stack(list(self._pool.map(decode, indices.tolist(), seeds)))
        return mirrored(pixels, generator) if flip else pixels

    def eval_batch(self, indices: Tensor) -> Tensor:
        """Return uint8 (B, 3, S, S) without augmentation."""
        return torch.stack(list(self._pool.map(self._whole, indices.tolist())))

    def _whole(self, row: int, _seed: int = 0) -> Tensor:
        return resize_and_crop(self._decode(row), self._preprocessing)

    def _random_part(self, row: int, seed: int) -> Tensor:
        pixels = self._decode(row)
        size = [self._preprocessing.image_size] * 2
        # torchvision draws from the global generator only, which threads would share: the draw is made here.
        top, left, height, width = crop_box(pixels.shape[1], pixels.shape[2], torch.Generator().manual_seed(seed))
        resized: Tensor = transforms.resized_crop(pixels, top, left, height, width, size, antialias=True)
        return resized

    def _decode(self, row: int) -> Tensor:
        path = self._directory / self.files[row]
        try:
            return decode_image(path.read_bytes())
        except (OSError, InvalidImage) as error:
            raise TrainingFailed(f"{path} can't be used: {error}; prepare the dataset again") from error


def crop_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random part: 25 to 100 % of the area, sides 3:4 to 4:3 (Szegedy 2014)."""
    area = height * width
    for _ in range(10):
        scale, shape, down, right = torch.rand(4, generator=generator).tolist()
        target = area * (_FILE_CROP_SCALE[0] + scale * (_FILE_CROP_SCALE[1] - _FILE_CROP_SCALE[0]))
        ratio = (3 / 4) * (16 / 9) ** shape
        part_height, part_width = round((target / ratio) ** 0.5), round((target * ratio) ** 0.5)
        if 0 < part_height <= height and 0 < part_width <= width:
            top, left = int(down * (height - part_height + 1)), int(right * (width - part_width + 1))
            return top, left, part_height, part_width
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the batch (B, 3, H, W), each image padded by reflection and cut back to its size at a random place."""
    batch, _, height, width = pixels.shape
    pad = max(min(height, width) // _PADDING_SHARE, 1)
    padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad), mode="reflect")
    offsets = torch.randint(2 * pad + 1, (batch, 2), generator=generator).tolist()
    result = torch.empty_like(pixels)
    # A loop of plain copies: on a CPU half the time of a gather by index tensors.
    for row, (top, left) in enumerate(offsets):
        result[row] = padded[row, :, top : top + height, left : left + width]
    return result


def mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the batch (B, 3, H, W) with a random half of the images mirrored left to right."""
    flips = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
