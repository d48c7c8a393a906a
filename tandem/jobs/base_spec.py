"""What all job specs share. Free of torch."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from tandem.checkpoints.references import parse_reference
from tandem.errors import InvalidName, InvalidReference
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


class Job(BaseModel):
    """What all jobs share."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    dataset: Name
    device: Device = "auto"
    num_threads: int | None = Field(None, ge=1, le=1024)


class TrainingJob(Job):
    """What both kinds of training share.

    Besides its best checkpoint a run keeps the newest `keep_last`, and one at the end of each `keep_every`-th epoch.
    """

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
    keep_last: int = Field(2, ge=1, le=1_000_000)
    keep_every: int | None = Field(None, ge=1, le=100_000)

    @property
    def is_distributed(self) -> bool:
        """True where several processes train together."""
        return self.num_devices > 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        """Yield what makes no sense together, a line each."""
        if self.is_distributed and ":" in self.device:
            yield f"device {self.device} is one device; with num_devices {self.num_devices} give cpu or cuda"
