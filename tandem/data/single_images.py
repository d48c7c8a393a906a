"""Augmentation of images one by one, by torchvision's transforms, in the loader processes of a training run."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tandem.checkpoints.card import Preprocessing
from tandem.data.augment import MAX_RATIO, PADDING_SHARE, Augmentation
from tandem.data.images import resize_and_crop
from tandem.data.splits import ImageSplit
from tandem.errors import TrainingFailed
from tandem.vision import v2


class Key(NamedTuple):
    """Which image, the seed of its augmentation, and the side that it gets."""

    row: int
    seed: int
    size: int


class SingleImages(Dataset[Tensor | str]):
    """Augmented images of a split by `Key`: uint8 (3, size, size), a function of the key alone.

    What can't be decoded comes as a message: an exception from another process would arrive as its traceback.
    """

    def __init__(self, split: ImageSplit, augmentation: Augmentation, preprocessing: Preprocessing) -> None:
        self._split = split
        self._augmentation = augmentation
        self._preprocessing = preprocessing

    def __getitem__(self, key: Key) -> Tensor | str:
        # torchvision draws from the process's generator.
        torch.manual_seed(key.seed)
        try:
            pixels = self._split.image(key.row)
        except TrainingFailed as error:
            return str(error)
        changed: Tensor = transforms(self._augmentation, self._preprocessing.at_size(key.size))(pixels)
        return changed


def collate(images: Sequence[Tensor | str]) -> Tensor | str:
    """Return the images as a batch (B, 3, size, size), or the first message among them."""
    messages = [image for image in images if isinstance(image, str)]
    return messages[0] if messages else torch.stack([image for image in images if isinstance(image, Tensor)])


@lru_cache(maxsize=64)
def transforms(augmentation: Augmentation, preprocessing: Preprocessing) -> v2.Compose:
    """Return torchvision's transforms from uint8 (3, H, W) to uint8 (3, S, S), S the preprocessing's size."""
    steps = [*_crop(augmentation, preprocessing)]
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.auto_augment == "randaugment":
        steps.append(v2.RandAugment())
    elif augmentation.auto_augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    if strength := augmentation.color_jitter:
        steps.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
    if augmentation.random_erasing:
        # To the mean, which is 0 once normalised, as where it is done after normalising.
        mean = [round(255 * value) for value in preprocessing.mean]
        steps.append(v2.RandomErasing(p=augmentation.random_erasing, value=mean))
    return v2.Compose(steps)


def _crop(augmentation: Augmentation, preprocessing: Preprocessing) -> list[v2.Transform]:
    size = preprocessing.image_size
    if augmentation.crop == "resized":
        area, ratio = (augmentation.min_crop_area, 1.0), (1 / MAX_RATIO, MAX_RATIO)
        return [v2.RandomResizedCrop(size, scale=area, ratio=ratio, antialias=True)]
    whole = v2.Lambda(lambda pixels: resize_and_crop(pixels, preprocessing))
    if augmentation.crop == "none":
        return [whole]
    return [whole, v2.RandomCrop(size, padding=max(size // PADDING_SHARE, 1), padding_mode="reflect")]
