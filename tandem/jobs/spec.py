"""Job specs: what a person asked for, validated, closed and frozen. Free of torch.

A spec holds every value that shapes the result, so that the same spec on the same data gives the same bytes.
"""

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from tandem.checkpoints.references import parse_reference
from tandem.errors import InvalidJob, InvalidName, InvalidReference
from tandem.jobs.architectures import ARCHITECTURES, has_small_stem
from tandem.models.names import LanguageModelName
from tandem.names import check_name


def _checked_name(name: str) -> str:
    try:
        return check_name(name, "the")
    except InvalidName as error:
        raise ValueError(str(error)) from None


def _checked_reference(reference: str) -> str:
    try:
        parse_reference(reference)
    except InvalidReference as error:
        raise ValueError(str(error)) from None
    return reference


Name = Annotated[str, AfterValidator(_checked_name)]
Reference = Annotated[str, AfterValidator(_checked_reference)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Precision = Literal["auto", "float32", "bfloat16"]


class _Job(BaseModel):
    """What all jobs share."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    dataset: Name
    device: Device = "auto"
    num_threads: int | None = Field(None, ge=1, le=1024)


class _Training(_Job):
    """What both kinds of training share."""

    model_name: Name
    epochs: int = Field(ge=1, le=100_000)
    batch_size: int = Field(ge=1, le=1_000_000)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Precision = "auto"
    accumulation: int = Field(1, ge=1, le=10_000)
    num_devices: int = Field(1, ge=1, le=64)
    compile: bool = False
    warmup_epochs: float | None = Field(None, ge=0, allow_inf_nan=False)
    checkpoint_every_s: float = Field(60.0, gt=0, allow_inf_nan=False)

    @property
    def is_distributed(self) -> bool:
        """True where several processes train together."""
        return self.num_devices > 1


class ClassifierJob(_Training):
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
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
        if self.is_distributed and ":" in self.device:
            yield f"device {self.device} is one device; with num_devices {self.num_devices} give cpu or cuda"
        if sum(each is not None for each in (self.weights_file, self.weights_from, self.resume_from)) > 1:
            yield "weights_file, weights_from and resume_from exclude one another"


class EvaluationJob(_Job):
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


# rms: what its authors give for WikiText-2 in segments of 20. sgd: on 20,000 valid tokens of WikiText-2 cut to 4000
# words, an LSTM of 128 came from ppl 46.2 to 44.3, 42.6, 41.3 and 46.7 at rates 0.03, 0.1, 0.3 and 1 (rms: 37.2,
# and 37.3 with statistics over 2,000,000 tokens).
DYNAMIC_DEFAULTS = {
    "rms": {"dynamic_rate": 1.2e-4, "dynamic_decay": 8e-3},
    "sgd": {"dynamic_rate": 0.1, "dynamic_decay": 1e-3},
}


class TextEvaluationJob(_Job):
    """Evaluate a language model on a split of a prepared text dataset: its perplexity, and that of a mode beside it.

    - `model` is a model reference. `split` None is test where the dataset has one, else valid.
    - `window` is the number of tokens read at a time; state is carried, so it changes no result.
    - `mode` cache adds the continuous cache of Grave et al. (2016): `cache_window` states, `cache_theta` times the dot
      product of two states, and the share `cache_lambda` of the mixture.
    - `mode` dynamic adds dynamic evaluation (Krause et al. 2018): after each `dynamic_segment` tokens a step of
      `dynamic_rate`, and of `dynamic_decay` back. `dynamic_rule` rms divides gradients by their root mean square over
      the first `dynamic_statistics` tokens of the train split; sgd does not. A rate or decay of None, or left out, is
      the rule's own: DYNAMIC_DEFAULTS.
    """

    kind: Literal["evaluate_language_model"] = "evaluate_language_model"
    model: Reference
    split: str | None = None
    mode: Literal["plain", "cache", "dynamic"] = "plain"
    window: int = Field(256, ge=1, le=4096)
    precision: Precision = "float32"
    limit_tokens: int | None = Field(None, ge=2)
    cache_window: int = Field(2000, ge=1, le=1_000_000)
    cache_theta: float = Field(0.3, ge=0, allow_inf_nan=False)
    cache_lambda: float = Field(0.1, gt=0, lt=1)
    dynamic_rule: Literal["rms", "sgd"] = "rms"
    dynamic_segment: int = Field(20, ge=1, le=4096)
    dynamic_rate: float = Field(gt=0, allow_inf_nan=False)
    dynamic_decay: float = Field(ge=0, le=1)
    dynamic_statistics: int = Field(200_000, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _with_rates_of_the_rule(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        return {**DYNAMIC_DEFAULTS.get(str(given.get("dynamic_rule")), DYNAMIC_DEFAULTS["rms"]), **given}

    @property
    def model_name(self) -> str:
        """What the record calls the run's model."""
        return self.model


class LanguageModelJob(_Training):
    """Train a language model on a prepared text dataset.

    - `batch_size` is the number of rows that the text is cut into, over all devices; `accumulation` trains on so many
      parts of them one after another. `bptt` is the number of tokens in a training window; with `variable_bptt` windows
      vary about it, and the learning rate with them.
    - `schedule` anneal divides the learning rate by 4 whenever an epoch does not improve the validation loss, as the
      well-known example does, for both optimizers; the others are as for classifiers.
    - `context_length` is how far back each layer of a Transformer sees; None takes four windows.
    - Of AWD_LSTM alone: shares of the embedding's words, of its output, of what passes between layers, and of the
      weights from state to state that are dropped (`dropout` is then that of the output); it may be trained with the
      penalties of Merity et al. on large activations (alpha, usually 2) and on their change (beta, usually 1).
    - `average_after`: once so many evaluations brought nothing, the mean of the weights from there on is the model.
    """

    kind: Literal["train_language_model"] = "train_language_model"
    model: LanguageModelName
    epochs: int = Field(6, ge=1, le=100_000)
    batch_size: int = Field(20, ge=1, le=100_000)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.0, ge=0, lt=1)
    learning_rate: float = Field(2e-3, gt=0, allow_inf_nan=False)
    schedule: Literal["anneal", "cosine", "linear", "onecycle", "constant"] = "anneal"
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    embedding_size: int = Field(200, ge=1, le=16_384)
    hidden_size: int = Field(200, ge=1, le=16_384)
    num_layers: int = Field(2, ge=1, le=128)
    num_heads: int = Field(2, ge=1, le=128)
    dropout: float = Field(0.2, ge=0, lt=1)
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    input_dropout: float = Field(0.0, ge=0, lt=1)
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    weight_dropout: float = Field(0.0, ge=0, lt=1)
    activation_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)
    change_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)
    average_after: int | None = Field(None, ge=1)
    tied: bool = False
    bptt: int = Field(35, ge=1, le=65_536)
    variable_bptt: bool = False
    context_length: int | None = Field(None, ge=1, le=1_000_000)
    clip_norm: float = Field(0.25, gt=0, allow_inf_nan=False)
    limit_train_tokens: int | None = Field(None, ge=2)
    limit_val_tokens: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        if self.model == "Transformer" and self.embedding_size % (2 * self.num_heads):
            yield (
                f"embedding_size {self.embedding_size} must be a multiple of twice num_heads ({self.num_heads}): "
                "each head rotates its features in pairs"
            )
        is_narrowed = self.model in ("Transformer", "AWD_LSTM")
        if self.tied and not is_narrowed and self.embedding_size != self.hidden_size:
            yield f"tied needs embedding_size ({self.embedding_size}) = hidden_size ({self.hidden_size})"
        for field in ("embedding_dropout", "input_dropout", "hidden_dropout", "weight_dropout"):
            if getattr(self, field) and self.model != "AWD_LSTM":
                yield f"{field} is for AWD_LSTM, not for {self.model}; use dropout"
        if self.context_length and self.model != "Transformer":
            yield f"context_length is for the Transformer; {self.model} carries its state on without end"
        if self.batch_size < self.accumulation * self.num_devices:
            yield f"batch_size {self.batch_size} gives none to some of its {self.accumulation * self.num_devices} parts"
        if self.compile and self.variable_bptt:
            yield "compile and variable_bptt exclude one another: each length would be compiled by itself"
        if self.average_after and self.schedule == "anneal":
            yield "average_after takes the place of annealing; use schedule constant"
        if self.is_distributed and ":" in self.device:
            yield f"device {self.device} is one device; with num_devices {self.num_devices} give cpu or cuda"


# Where the command line's option has another name than the field.
_OPTIONS = {
    "dataset": "data",
    "model_name": "name",
    "num_workers": "workers",
    "resume_from": "resume",
    "limit_images": "limit",
    "limit_tokens": "limit",
}

TrainingSpec = ClassifierJob | LanguageModelJob
JobSpec = TrainingSpec | EvaluationJob | TextEvaluationJob
_SPEC: TypeAdapter[JobSpec] = TypeAdapter(Annotated[JobSpec, Field(discriminator="kind")])


def make_spec(values: dict[str, Any]) -> JobSpec:
    """Validate `values` (with their `kind`); raise InvalidJob that names the first wrong field."""
    try:
        return _SPEC.validate_python(values)
    except ValidationError as error:
        raise _explained(error) from None


def parse_spec(data: bytes) -> JobSpec:
    """Read the bytes of `job.json`."""
    try:
        return _SPEC.validate_json(data)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> InvalidJob:
    first = error.errors()[0]
    if first["type"] == "missing":
        field = str(first["loc"][-1])
        return InvalidJob(f"--{_OPTIONS.get(field, field).replace('_', '-')} is missing", field=field)
    field = ".".join(str(part) for part in first["loc"][1:])
    reason = first["msg"].removeprefix("Value error, ")
    option = f"--{_OPTIONS.get(field, field).replace('_', '-')}: " if field else ""
    if str((first["loc"] or ("",))[0]).startswith("evaluate_") and field == "model":
        option = "REF: "
    given = f" (got {first['input']!r})" if field and first["type"] != "value_error" else ""
    return InvalidJob(f"{option}{reason}{given}", field=field)
