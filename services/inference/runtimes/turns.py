"""Where what a load tries out is run: in turns of the device, so that it competes with no call for the processor.

A load that ran its batches beside the device's thread made calls wait 18 times as long as undisturbed (p99, 2 cores).
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from services.inference.runtimes.interface import ClassifierRuntime, RunsBeside


class Turns(Protocol):
    """Runs a piece of work when its turn has come, and returns what it returned."""

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Run `work`; raise what it raises."""
        ...


def at_once(work: Callable[[], Any]) -> Any:
    """Run `work` here and now: for a device that nobody else uses."""
    return work()


class InTurns:
    """A runtime whose batches wait for their turns."""

    def __init__(self, runtime: ClassifierRuntime, turns: Turns) -> None:
        self.name, self.dtype = runtime.name, runtime.dtype
        self._runtime, self._turns = runtime, turns

    def predict(self, pixels: Tensor) -> Tensor:
        """Return logits float32 (B, C) for pixels uint8 (B, 3, S, S)."""
        logits: Tensor = self._turns(lambda: self._runtime.predict(pixels))
        return logits

    @property
    def beside_from(self) -> int:
        """See RunsBeside; 0 where batches never run beside each other."""
        return self._runtime.beside_from if isinstance(self._runtime, RunsBeside) else 0

    @property
    def beside_sizes(self) -> tuple[int, ...]:
        """See RunsBeside; none where batches never run beside each other."""
        return self._runtime.beside_sizes if isinstance(self._runtime, RunsBeside) and self.beside_from else ()

    def on_each_stream(self, pixels: Tensor) -> list[Tensor]:
        """See RunsBeside."""
        runtime = self._runtime
        assert isinstance(runtime, RunsBeside)
        logits: list[Tensor] = self._turns(lambda: runtime.on_each_stream(pixels))
        return logits

    def warm(self) -> None:
        """Run once."""
        self._turns(self._runtime.warm)
