"""What the server asks of a runtime; calls come from the workers of its device, one at a time but for `RunsBeside`."""

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from tandem.models.language_models import ModelState
from tandem.models.slots import Slots

Precision = Literal["float32", "bfloat16", "int8"]


class ClassifierRuntime(Protocol):
    """Runs a classifier; `name` says how ("eager"), `dtype` in which precision."""

    name: str
    dtype: str

    def predict(self, pixels: Tensor) -> Tensor:
        """Return logits float32 (B, C) on the CPU for pixels uint8 (B, 3, S, S), B ≥ 1."""
        ...

    def warm(self) -> None:
        """Run once; raise CheckpointCorrupt if the answer is not finite."""
        ...


@runtime_checkable
class RunsBeside(Protocol):
    """What a classifier's runtime also has if batches of it may run beside each other, from `beside_from` images on."""

    beside_from: int
    # Of the batches that it is to be made ready for.
    beside_sizes: tuple[int, ...]

    def predict_beside(self, pixels: Tensor) -> Tensor:
        """Do what `predict` does on a share of the device, while other workers do so on theirs; the bits are equal."""
        ...

    def on_each_stream(self, pixels: Tensor) -> list[Tensor]:
        """Return the logits of `pixels` from each share of the device, computed at once."""
        ...


class LanguageRuntime(Protocol):
    """Runs a language model; `name` says how, `dtype` in which precision."""

    name: str
    dtype: str

    def read(self, token_ids: list[int], state: ModelState | None) -> ModelState:
        """Return the state after `token_ids` (one or more), of a batch of one; `state` None is the start of a text."""
        ...

    def make_slots(self) -> Slots:
        """Return slots for as many texts as are stepped together."""
        ...

    def warm(self) -> None:
        """Run once; raise CheckpointCorrupt if the answer is not finite."""
        ...
