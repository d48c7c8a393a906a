"""The batches of an epoch: read, augmented, and on the device. They are a function of (seed, epoch, step)."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from services.trainer.engine.prefetch import prefetched
from services.trainer.engine.ranks import ALONE, Ranks
from tandem.checkpoints.card import Preprocessing
from tandem.data.augment import Augmentation, augment_batch, draw
from tandem.data.randomness import derive_seed, generator
from tandem.data.single_images import Key, SingleImages, collate
from tandem.data.splits import ImageSplit, PackedSplit
from tandem.errors import TrainingFailed
from tandem.jobs.spec import ClassifierJob

# More hardly help: the reading of a machine of this size is bound elsewhere.
_MAX_WORKERS = 16


@dataclass(frozen=True)
class StepRows:
    """The images of one update: rows of the split (B,), of all processes together, and the side that they get."""

    epoch: int
    step: int
    rows: Tensor
    size: int


class Batch(NamedTuple):
    """A process's share of a step: `images` (b, 3, size, size) of 0…255, `labels` (b,); and how many are in all."""

    images: Tensor
    labels: Tensor
    num_all: int


class Batches(Protocol):
    """Makes the batches of a split."""

    def make(self, steps: Iterable[StepRows]) -> Iterator[Batch]:
        """Yield the batch of each step, on the device."""
        ...


@dataclass(frozen=True)
class WholeBatches:
    """Packed pixels, augmented a batch at a time on the device."""

    split: PackedSplit
    augmentation: Augmentation
    preprocessing: Preprocessing
    seed: int
    device: torch.device
    ranks: Ranks = ALONE

    def make(self, steps: Iterable[StepRows]) -> Iterator[Batch]:
        """Yield the batches; for a GPU the next one is read while the current one trains."""
        # On a CPU there is nobody else to do it.
        read = prefetched(steps, self._read) if self.device.type == "cuda" else map(self._read, steps)
        for step, pixels, draws, labels in read:
            on_device = pixels.to(self.device, non_blocking=True), draws.to(self.device, non_blocking=True)
            images = augment_batch(*on_device, self.augmentation, self.preprocessing, step.size)
            yield Batch(images, labels.to(self.device, non_blocking=True), len(step.rows))

    def _read(self, step: StepRows) -> tuple[StepRows, Tensor, Tensor, Tensor]:
        # Drawn for the images of all processes, so that the outcome does not depend on how many there are.
        randomness = generator(self.seed, "augment", step.epoch, step.step)
        draws = self.ranks.share(draw(len(step.rows), randomness))
        mine = self.ranks.share(step.rows)
        pixels = self.split.pixels(mine)
        if self.device.type == "cuda" and not pixels.is_cuda:
            pixels = pixels.pin_memory()
        return step, pixels, draws, self.split.labels[mine]


class LoadedBatches:
    """Images augmented one by one by loader processes, which live as long as this does."""

    def __init__(
        self,
        split: ImageSplit,
        augmentation: Augmentation,
        preprocessing: Preprocessing,
        seed: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        num_workers: int | None = None,
    ) -> None:
        self._split, self._seed, self._device, self._ranks = split, seed, device, ranks
        if num_workers is None:
            num_workers = min(max(len(os.sched_getaffinity(0)) // ranks.size, 1), _MAX_WORKERS)
        self._plan: list[list[Key]] = []
        self._loader: DataLoader[Any] = DataLoader(
            SingleImages(split, augmentation, preprocessing),
            batch_sampler=_Plan(self._plan),
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            # They touch neither the device nor a lock of ours, and need no second import of torch.
            multiprocessing_context="fork" if num_workers else None,
        )

    def make(self, steps: Iterable[StepRows]) -> Iterator[Batch]:
        """Yield the batches; the loader works some steps ahead."""
        steps = list(steps)
        self._plan[:] = [[self._key(step, row) for row in self._ranks.share(step.rows).tolist()] for step in steps]
        for step, images in zip(steps, self._loader, strict=True):
            if isinstance(images, str):
                raise TrainingFailed(images)
            labels = self._split.labels[self._ranks.share(step.rows)]
            on_device = images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
            yield Batch(*on_device, len(step.rows))

    def _key(self, step: StepRows, row: int) -> Key:
        return Key(row, derive_seed(self._seed, "image", step.epoch, row), step.size)


class _Plan:
    """The keys of each batch of the epoch in hand."""

    def __init__(self, batches: list[list[Key]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(list(self._batches))

    def __len__(self) -> int:
        return len(self._batches)


def steps_per_epoch(spec: ClassifierJob, num_train: int, num_val: int) -> int:
    """Return the updates of an epoch; raise TrainingFailed where there are too few images for one."""
    if num_train < spec.batch_size:
        raise TrainingFailed(
            f"{num_train} train images are too few for --batch-size {spec.batch_size}; use at most {num_train}"
        )
    if num_val < spec.num_devices:
        raise TrainingFailed(f"{num_val} val images are too few for {spec.num_devices} devices")
    whole, rest = divmod(num_train, spec.batch_size)
    # A last batch that leaves a part with one image would have no variance for a batch norm to divide by: left out.
    return whole + (rest >= 2 * spec.accumulation * spec.num_devices)


def augmentation_of(spec: ClassifierJob, is_packed: bool) -> Augmentation:
    """Return how `spec` changes training images."""
    automatic = "shift" if is_packed else "resized"
    return Augmentation(
        crop=automatic if spec.crop == "auto" else spec.crop,  # type: ignore[arg-type]
        flip=spec.flip,
        min_crop_area=spec.min_crop_area,
        color_jitter=spec.color_jitter,
        auto_augment=spec.auto_augment,
        random_erasing=spec.random_erasing,
    )


def make_batches(
    spec: ClassifierJob, train: ImageSplit, preprocessing: Preprocessing, device: torch.device, ranks: Ranks
) -> Batches:
    """Return the maker of the batches of `train` that suits the split and the augmentations of `spec`."""
    is_packed = isinstance(train, PackedSplit)
    augmentation = augmentation_of(spec, is_packed)
    if isinstance(train, PackedSplit) and not spec.augments_each_image:
        return WholeBatches(train, augmentation, preprocessing, spec.seed, device, ranks)
    return LoadedBatches(train, augmentation, preprocessing, spec.seed, device, ranks, spec.num_workers)
