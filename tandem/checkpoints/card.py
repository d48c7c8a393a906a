"""`model.json`: all that serving needs to know of a checkpoint besides its tensors. Free of torch."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tandem.data.manifest import ClassName
from tandem.errors import CheckpointCorrupt
from tandem.models.names import LanguageModelName


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Preprocessing(_Closed):
    """From decoded pixels to the network: shorter side to `resize` (bilinear, antialiased), centre `image_size` cut."""

    resize: int = Field(ge=1)
    image_size: int = Field(ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear"] = "bilinear"

    def at_size(self, size: int) -> "Preprocessing":
        """Return the same transform to another `image_size`: the same part of the image, in fewer or more pixels."""
        if size == self.image_size:
            return self
        resize = max(round(self.resize * size / self.image_size), size)
        return self.model_copy(update={"image_size": size, "resize": resize})


class _Card(_Closed):
    """What both kinds say: where the weights come from, and how good they are on the val split."""

    format_version: Literal[1] = 1
    run_id: str
    epoch: int
    step: int
    seed: int
    dtype: Literal["float32"] = "float32"
    num_parameters: int
    dataset: str
    dataset_fingerprint: str
    metrics: dict[str, float]
    library_versions: dict[str, str]


class ClassifierCard(_Card):
    """A classifier: `classes` in the order of its outputs."""

    kind: Literal["classifier"] = "classifier"
    arch: str
    stem: Literal["stock", "small"] = "stock"
    classes: tuple[ClassName, ...]
    preprocessing: Preprocessing

    @property
    def architecture(self) -> str:
        """The network's name."""
        return self.arch


class LanguageModelCard(_Card):
    """A language model; the fields are those of `tandem.models.language_models.LanguageModelShape`."""

    kind: Literal["language_model"] = "language_model"
    model: LanguageModelName
    vocabulary_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    dropout: float
    tied: bool
    context_length: int

    @property
    def architecture(self) -> str:
        """The network's name."""
        return self.model


Card = ClassifierCard | LanguageModelCard
_CARD: TypeAdapter[Card] = TypeAdapter(Annotated[Card, Field(discriminator="kind")])


def quality(kind: str, metrics: Mapping[str, float]) -> float:
    """Return what makes one checkpoint of a kind better than another, the more the better; -inf if not evaluated."""
    if kind == "classifier":
        return metrics.get("val_acc1", float("-inf"))
    return -metrics.get("val_loss", float("inf"))


def parse_card(data: bytes) -> Card:
    """Read the bytes of `model.json`; raise CheckpointCorrupt if they are no card of this version."""
    try:
        return _CARD.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointCorrupt(f"model.json is not of a format this version reads: {where}: {first['msg']}") from error
