"""Room in a device's queue that a call holds while it is in the server; all its work goes through it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from services.inference.admission import Load
from services.inference.calls import Done, Order, Ranked
from services.inference.lanes import Priority
from services.inference.statistics import Passage
from services.inference.text_statistics import TextPassage

T = TypeVar("T")


class Predicts(Protocol):
    """What is needed of a runtime to predict; see ClassifierRuntime for what else it may have."""

    def predict(self, pixels: Tensor) -> Tensor:
        """Return logits (B, C) for pixels (B, 3, S, S)."""
        ...


class Queue(Protocol):
    """What a place needs of a DeviceScheduler."""

    async def run(self, work: Callable[[], T], deadline: float | None, priority: Priority, runtime: object) -> Done[T]:
        """Run `work` in its turn."""
        ...

    async def await_images(
        self, runtime: Predicts, pixels: Tensor, order: Order, place: "Place | None" = None
    ) -> Done[Any]:
        """Return the answer to `order`."""
        ...


@dataclass(eq=False)
class Place:
    """Room in the queue that a call holds; its work has the call's deadline and priority."""

    _scheduler: Queue
    load: Load
    deadline: float | None
    priority: Priority
    announced: bool
    passage: Passage = field(default_factory=Passage)

    def text(self, num_prompt_tokens: int) -> TextPassage:
        """Return what is to be told of a text that this call writes."""
        return self.passage.text(num_prompt_tokens)

    async def run(self, work: Callable[[], T], runtime: object = None) -> Done[T]:
        """See DeviceScheduler.run."""
        self.passage.asks()
        return self.passage.returned(await self._scheduler.run(work, self.deadline, self.priority, runtime))

    async def predict(self, runtime: Predicts, pixels: Tensor, joins: bool = False) -> Done[Tensor]:
        """See DeviceScheduler.predict."""
        return await self._await_images(runtime, pixels, Order(self.deadline, self.priority, joins))

    async def rank(self, runtime: Predicts, pixels: Tensor, top_k: int, joins: bool = False) -> Done[Ranked]:
        """Do what `predict` does, and return the `top_k` ≥ 1 classes (or all, if they are fewer) of each image."""
        return await self._await_images(runtime, pixels, Order(self.deadline, self.priority, joins, top_k))

    async def _await_images(self, runtime: Predicts, pixels: Tensor, order: Order) -> Done[Any]:
        self.passage.asks()
        return self.passage.returned(await self._scheduler.await_images(runtime, pixels, order, self))
