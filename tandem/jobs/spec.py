"""Job specs: what a person asked for, validated, closed and frozen. Free of torch.

A spec holds every value that shapes the result, so that the same spec on the same data gives the same bytes.
"""

import difflib
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

from tandem.errors import InvalidJob, InvalidName
from tandem.jobs.architectures import ARCHITECTURES
from tandem.names import check_name


def _checked_name(name: str) -> str:
    try:
        return check_name(name, "the")
    except InvalidName as error:
        raise ValueError(str(error)) from None


Name = Annotated[str, AfterValidator(_checked_name)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
LanguageModelName = Literal["RNN_TANH", "RNN_RELU", "LSTM", "GRU", "Transformer"]


class _Training(BaseModel):
    """What both kinds of training share."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    dataset: Name
    model_name: Name
    epochs: int = Field(ge=1, le=100_000)
    batch_size: int = Field(ge=1, le=1_000_000)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**63)
    device: Device = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    num_threads: int | None = Field(None, ge=1, le=1024)
    checkpoint_every_s: float = Field(60.0, gt=0, allow_inf_nan=False)


class ClassifierJob(_Training):
    """Train a torchvision classifier by SGD with Nesterov momentum on a prepared image dataset.

    `image_size` is the side in pixels that the network sees; None takes the dataset's own size where all its images
    share one of at most 96 pixels, and 224 otherwise. `schedule` runs to zero (cosine), or divides by 10 each third of
    the epochs (step).
    """

    kind: Literal["train_classifier"] = "train_classifier"
    arch: str
    epochs: int = Field(10, ge=1, le=100_000)
    batch_size: int = Field(64, ge=2, le=1_000_000)
    learning_rate: float = Field(0.05, gt=0, allow_inf_nan=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0, allow_inf_nan=False)
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = Field(1.0, ge=0, allow_inf_nan=False)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    image_size: int | None = Field(None, ge=8, le=1024)
    crop: bool = True
    flip: bool = True
    limit_train_images: int | None = Field(None, ge=1)
    limit_val_images: int | None = Field(None, ge=1)

    @field_validator("arch")
    @classmethod
    def _known_architecture(cls, arch: str) -> str:
        if arch in ARCHITECTURES:
            return arch
        near = difflib.get_close_matches(arch, ARCHITECTURES, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "for example resnet18, mobilenet_v3_small, vit_b_16"
        raise ValueError(f"no torchvision classifier is called {arch!r}; {hint}")


class LanguageModelJob(_Training):
    """Train a word-level language model on a prepared text dataset.

    `bptt` is the number of tokens in a training window. The learning rate is divided by 4 whenever an epoch does not
    improve the validation loss, as in the well-known example, for both optimizers.
    """

    kind: Literal["train_language_model"] = "train_language_model"
    model: LanguageModelName
    epochs: int = Field(6, ge=1, le=100_000)
    batch_size: int = Field(20, ge=1, le=100_000)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(2e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    embedding_size: int = Field(200, ge=1, le=16_384)
    hidden_size: int = Field(200, ge=1, le=16_384)
    num_layers: int = Field(2, ge=1, le=128)
    num_heads: int = Field(2, ge=1, le=128)
    dropout: float = Field(0.2, ge=0, lt=1)
    tied: bool = False
    bptt: int = Field(35, ge=1, le=65_536)
    clip_norm: float = Field(0.25, gt=0, allow_inf_nan=False)
    limit_train_tokens: int | None = Field(None, ge=2)
    limit_val_tokens: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model == "Transformer":
            if self.embedding_size % (2 * self.num_heads):
                raise ValueError(
                    f"embedding_size {self.embedding_size} must be a multiple of twice num_heads ({self.num_heads}): "
                    "each head rotates its features in pairs"
                )
        elif self.tied and self.embedding_size != self.hidden_size:
            raise ValueError(f"tied needs embedding_size ({self.embedding_size}) = hidden_size ({self.hidden_size})")
        return self


# Where the command line's option has another name than the field.
_OPTIONS = {"dataset": "data", "model_name": "name"}

JobSpec = ClassifierJob | LanguageModelJob
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
    field = ".".join(str(part) for part in first["loc"][1:])
    reason = first["msg"].removeprefix("Value error, ")
    option = f"--{_OPTIONS.get(field, field).replace('_', '-')}: " if field else ""
    given = f" (got {first['input']!r})" if field and first["type"] != "value_error" else ""
    return InvalidJob(f"{option}{reason}{given}", field=field)
