"""What the server asks of a runtime; all calls come from the one thread of its device."""

from typing import Any, Protocol

from torch import Tensor


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

    def step(self, token_ids: list[int], state: Any) -> tuple[Tensor, Any]:
        """Return the logits float32 (V,) after the last of `token_ids` (one or more), and the state after them.

        The state given is used up.
        """
        ...

    def warm(self) -> None:
        """Run once; raise CheckpointCorrupt if the answer is not finite."""
        ...
