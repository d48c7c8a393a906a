"""Image splits as training, evaluation and comparison read them: labels, and uint8 pixels by index."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from tandem.checkpoints.card import Preprocessing
from tandem.data.images import decode_image, resize_and_crop
from tandem.data.manifest import ImageDataset, read_index, read_sizes, spread
from tandem.errors import InvalidImage, TrainingFailed


class ImageSplit(Protocol):
    """N images: `labels` (N,) int64 on the CPU, `files` relative to the dataset."""

    labels: Tensor
    files: Sequence[str]

    def image(self, row: int) -> Tensor:
        """Return image `row` as it is stored, uint8 (3, H, W)."""
        ...

    def eval_batch(self, indices: Tensor) -> Tensor:
        """Return the images `indices` (B,) as uint8 (B, 3, S, S), resized and centre-cropped as serving does."""
        ...


def open_split(
    directory: Path,
    dataset: ImageDataset,
    split: str,
    preprocessing: Preprocessing,
    limit: int | None,
    from_files: bool = False,
) -> ImageSplit:
    """Return split `split` of the dataset in `directory`; with `limit`, that many images spread over the classes.

    Packed pixels are used where there are any, unless `from_files`. Raises DatasetNotFound where there is no such
    split, and TrainingFailed where a file has gone or changed its size since it was prepared.
    """
    index = read_index(directory, split)
    chosen = spread(len(index), limit)
    files = [index[row][0] for row in chosen]
    labels = torch.tensor([index[row][1] for row in chosen], dtype=torch.int64)
    if dataset.packed and not from_files:
        pixels = _map_packed(directory / "packed" / f"{split}.npy", len(index))
        return PackedSplit(pixels, torch.tensor(chosen, dtype=torch.int64), labels, files, preprocessing)
    sizes = read_sizes(directory, split)
    if sizes is not None:
        _check_files(directory, files, [sizes[row] for row in chosen])
    return FileSplit(directory, labels, files, preprocessing)


def _map_packed(path: Path, num_images: int) -> np.ndarray:
    try:
        pixels: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise TrainingFailed(f"{path} can't be read ({error}); prepare the dataset again with --force") from error
    if len(pixels) != num_images:
        raise TrainingFailed(
            f"{path} holds {len(pixels)} images, its index {num_images}; prepare the dataset again with --force"
        )
    return pixels


def _check_files(directory: Path, files: Sequence[str], sizes: Sequence[int]) -> None:
    """Find now what would otherwise end a run in its third hour: 100,000 files take about half a second."""
    for file, size in zip(files, sizes, strict=True):
        try:
            found: int | None = (directory / file).stat().st_size
        except OSError:
            found = None
        if found != size:
            has = "is not there" if found is None else f"has {found} bytes, not {size}"
            raise TrainingFailed(f"{directory / file} {has}; prepare the dataset again with --force")


class PackedSplit:
    """Images of one small size in an array (N, 3, H, W): mapped from a file, or held on a device."""

    def __init__(
        self,
        pixels: np.ndarray | Tensor,
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

    @property
    def num_bytes(self) -> int:
        """Size of the images, all together."""
        return len(self._rows) * int(np.prod(self._pixels.shape[1:]))

    def on(self, device: torch.device) -> Self:
        """Return the split with its pixels on `device`, so that no batch has to be copied there."""
        pixels = self.pixels(torch.arange(len(self._rows))).to(device)
        return type(self)(pixels, torch.arange(len(self._rows)), self.labels, self.files, self._preprocessing)

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the images `indices` (B,) as they are stored, uint8 (B, 3, H, W), on the device that holds them."""
        rows = self._rows[indices]
        if isinstance(self._pixels, Tensor):
            return self._pixels[rows.to(self._pixels.device)]
        return torch.from_numpy(self._pixels[rows.numpy()])

    def image(self, row: int) -> Tensor:
        """Return image `row`, uint8 (3, H, W)."""
        return self.pixels(torch.tensor([row]))[0]

    def eval_batch(self, indices: Tensor) -> Tensor:
        """Return uint8 (B, 3, S, S) without augmentation."""
        return resize_and_crop(self.pixels(indices), self._preprocessing)


class FileSplit:
    """Images of any size in files, decoded when they are asked for; batches by a pool of threads."""

    def __init__(self, directory: Path, labels: Tensor, files: Sequence[str], preprocessing: Preprocessing) -> None:
        self._directory = directory
        self._preprocessing = preprocessing
        # The decoders drop the GIL.
        self._pool = ThreadPoolExecutor(thread_name_prefix="decode")
        self.labels = labels
        self.files = files

    def image(self, row: int) -> Tensor:
        """Return image `row`, uint8 (3, H, W); raise TrainingFailed, naming the file, where it does not decode."""
        path = self._directory / self.files[row]
        try:
            return decode_image(path.read_bytes())
        except (OSError, InvalidImage) as error:
            raise TrainingFailed(f"{path} can't be used: {error}; prepare the dataset again with --force") from error

    def eval_batch(self, indices: Tensor) -> Tensor:
        """Return uint8 (B, 3, S, S) without augmentation."""
        return torch.stack(list(self._pool.map(self._whole, indices.tolist())))

    def _whole(self, row: int) -> Tensor:
        return resize_and_crop(self.image(row), self._preprocessing)
