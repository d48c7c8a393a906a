"""What the server asks of a runtime; all calls come from the one thread of its device, or one that it waits for."""

from typing import Literal, Protocol

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
