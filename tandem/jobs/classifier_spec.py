"""The specs of jobs on images: training a classifier, and evaluating one."""

import difflib
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator

from tandem.jobs.architectures import ARCHITECTURES, has_small_stem
from tandem.jobs.base_spec import Job, Precision, Reference, TrainingJob


class ClassifierJob(TrainingJob):
    """Train a torchvision classifier by SGD on a prepared image dataset.

    - `batch_size` counts the images of one update, over all devices; `accumulation` cuts it into that many parts, one
      after another. `precision` auto is bfloat16 where the device has instructions for it.
    - `image_size` is the side in pixels that the network sees; None takes the dataset's own size where all its images
      share one of at most 96 pixels, and 224 otherwise. `resize` is the shorter side before the centre is cut out for
      evaluation; None keeps the whole of small images, and 8/7 of `image_size` for others. With `start_size` the side
      grows from there to `image_size` over the share `growth` of the epochs.
    - `crop` auto is `shift` (pad by an eighth and cut) for small packed images, `resized` (a random part of at least
      `min_crop_area` of the image) for others.
    - `schedule`: to zero by a cosine or a line; divided by 1/`step_factor` each `step_epochs` (None: a third of the
      epochs); one cycle (Smith 2018, as torch's OneCycleLR); or constant. `warmup_epochs` None is 1, and 30 % of the
      epochs for one cycle.
    - Weights to begin with: `weights_file` (safetensors, or a state dict of torch) or `weights_from` (a model
      reference); a head that does not fit is new. `resume_from` takes the whole state of a run's checkpoint.
    - `data_path`: packed pixels on the device, packed pixels mapped into memory, or files decoded by `num_workers`
      processes each epoch.
    """

    kind: Literal["train_classifier"] = "train_classifier"
    arch: str
    stem: Literal["stock", "small"] = "stock"
    epochs: int = Field(10, ge=1, le=100_000)
    start_epoch: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=2, le=1_000_000)
    learning_rate: float = Field(0.05, gt=0, allow_inf_nan=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(5e-4, ge=0, allow_inf_nan=False)
    decay_all: bool = False
    schedule: Literal["cosine", "linear", "step", "onecycle", "constant"] = "cosine"
    step_epochs: int | None = Field(None, ge=1)
    step_factor: float = Field(0.1, gt=0, lt=1)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0, le=100)
    cutmix: float = Field(0.0, ge=0, le=100)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    image_size: int | None = Field(None, ge=8, le=1024)
    resize: int | None = Field(None, ge=8, le=2048)
    start_size: int | None = Field(None, ge=8, le=1024)
    growth: float = Field(0.6, gt=0, le=1)
    crop: Literal["auto", "shift", "resized", "none"] = "auto"
    min_crop_area: float = Field(0.25, gt=0, le=1)
    flip: bool = True
    color_jitter: float = Field(0.0, ge=0, le=1)
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    random_erasing: float = Field(0.0, ge=0, le=1)
    flip_evaluation: bool = False
    data_path: Literal["auto", "device", "mapped", "files"] = "auto"
    num_workers: int | None = Field(None, ge=0, le=256)
    deterministic: bool = False
    weights_file: str | None = None
    weights_from: str | None = None
    resume_from: str | None = None
    limit_train_images: int | None = Field(None, ge=1)
    limit_val_images: int | None = Field(None, ge=1)

    @property
    def augments_each_image(self) -> bool:
        """True where an augmentation works on single images, so that loader processes do it rather than the device."""
        return bool(self.color_jitter or self.random_erasing) or self.auto_augment != "none"

    @field_validator("arch")
    @classmethod
    def _known_architecture(cls, arch: str) -> str:
        if arch in ARCHITECTURES:
            return arch
        near = difflib.get_close_matches(arch, ARCHITECTURES, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "for example resnet18, mobilenet_v3_small, vit_b_16"
        raise ValueError(f"no torchvision classifier is called {arch!r}; {hint}")

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.start_epoch >= self.epochs:
            yield f"start_epoch {self.start_epoch} must be below epochs ({self.epochs})"
        if self.stem == "small" and not has_small_stem(self.arch):
            yield f"stem small is for networks of the ResNet family, not for {self.arch}"
        if self.batch_size < 2 * self.accumulation * self.num_devices:
            parts = self.accumulation * self.num_devices
            yield f"batch_size {self.batch_size} gives less than 2 images to each of its {parts} parts"
        if self.start_size and self.image_size and self.start_size > self.image_size:
            yield f"start_size {self.start_size} is above image_size ({self.image_size})"
        if self.resize and self.image_size and self.resize < self.image_size:
            yield f"resize {self.resize} is below image_size ({self.image_size}): there would be nothing to cut out"
        if self.data_path == "device" and self.augments_each_image:
            yield "data_path device can crop and flip only; the other augmentations need mapped or files"
        if self.data_path == "device" and self.device == "cpu":
            yield "data_path device is for a GPU; on a CPU packed pixels are mapped (--data-path mapped)"
        if sum(each is not None for each in (self.weights_file, self.weights_from, self.resume_from)) > 1:
            yield "weights_file, weights_from and resume_from exclude one another"


class EvaluationJob(Job):
    """Evaluate a classifier on a split of a prepared image dataset, and write a predictions file.

    `model` is a model reference; `flip` adds the accuracy of the mean over each image and its mirror image, apart.
    """

    kind: Literal["evaluate_classifier"] = "evaluate_classifier"
    model: Reference
    split: str = "val"
    batch_size: int = Field(128, ge=1, le=1_000_000)
    precision: Precision = "float32"
    flip: bool = False
    top_k: int = Field(5, ge=1, le=1000)
    limit_images: int | None = Field(None, ge=1)

    @property
    def model_name(self) -> str:
        """What the record calls the run's model."""
        return self.model
