"""The calls whose images or work are in a batch: computed on a worker's thread, answered on their event loops."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from services.inference.lanes import Batch, Job, Priority

T = TypeVar("T")


@dataclass(frozen=True)
class Done(Generic[T]):
    """The result of a piece of work, and the milliseconds that it waited and ran (with what shared its batches)."""

    value: T
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class Ranked:
    """The best classes of N images, best first: probabilities float32 (N, K), and indices int64 (N, K)."""

    probabilities: Tensor
    indices: Tensor


@dataclass(frozen=True, slots=True)
class Order:
    """How work is to be done: by when (time.monotonic()), how urgent, in shared batches, with how many classes an image
    as the answer (0: the logits)."""

    deadline: float | None = None
    priority: Priority = Priority.NORMAL
    joins: bool = False
    top_k: int = 0
    # Of other work: it needs no more than one worker.
    beside: bool = False


@dataclass(eq=False, slots=True)
class Call:
    """Who asked for a job, and what was computed of it. With `pixels` None, `work` takes nothing."""

    work: Callable[..., Any]
    pixels: Tensor | None
    future: "asyncio.Future[Done[Any]]"
    loop: asyncio.AbstractEventLoop
    # How many classes of each image are wanted; 0 for the logits.
    top_k: int = 0
    # Does what `work` does, on one worker beside others, for a runtime that can.
    beside: Callable[[Tensor], Tensor] | None = None
    # By the place of their first item: parts that run beside each other end in any order.
    outputs: dict[int, Any] = field(default_factory=dict)
    # When batches of it began and ended.
    computed: list[tuple[float, float]] = field(default_factory=list)

    @property
    def compute_s(self) -> float:
        """How long it was computed; what two batches ran beside each other counts once."""
        total_s, until = 0.0, 0.0
        for started_at, ended_at in sorted(self.computed):
            total_s += max(0.0, ended_at - max(started_at, until))
            until = max(until, ended_at)
        return total_s


def compute(batch: Batch) -> None:
    """Run `batch`, and hand each call its part of the answer."""
    calls: list[Call] = [part.job.payload for part in batch.parts]
    first = calls[0]
    if first.pixels is None:
        first.outputs[0] = first.work()
        return
    pixels = [call.pixels[part.first : part.end] for call, part in zip(calls, batch.parts, strict=True)]  # type: ignore[index]
    work = first.work if batch.alone or first.beside is None else first.beside
    logits = work(pixels[0] if len(pixels) == 1 else torch.cat(pixels))
    # Once for the batch, and here: on the event loop this took each call 0.1 ms. Not with the largest K for all, or
    # equal probabilities would come in an order that hangs on the neighbours.
    outputs = {top_k: rank(logits, top_k) if top_k else logits for top_k in {call.top_k for call in calls}}
    end = 0
    for call, part in zip(calls, batch.parts, strict=True):
        first_row, end = end, end + part.end - part.first
        call.outputs[part.first] = _rows(outputs[call.top_k], first_row, end)


def rank(logits: Tensor, top_k: int) -> Ranked:
    """Return the `top_k` classes (or all, if they are fewer) of each row of logits (N, C)."""
    return Ranked(*torch.softmax(logits, dim=1).topk(min(top_k, logits.shape[1]), dim=1))


def _rows(output: Tensor | Ranked, first: int, end: int) -> Tensor | Ranked:
    if isinstance(output, Tensor):
        return output[first:end]
    return Ranked(output.probabilities[first:end], output.indices[first:end])


def _joined(outputs: Mapping[int, Any]) -> Any:
    if len(outputs) == 1:
        return next(iter(outputs.values()))
    return _concatenated([outputs[first] for first in sorted(outputs)])


def _concatenated(outputs: Sequence[Any]) -> Any:
    if isinstance(outputs[0], Tensor):
        return torch.cat(list(outputs))
    return Ranked(
        torch.cat([each.probabilities for each in outputs]),
        torch.cat([each.indices for each in outputs]),
    )


def answer(ended: Sequence[Job], ended_at: float) -> None:
    """Give the calls of `ended` their answers."""
    answers: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Done[Any]]]] = {}
    for job in ended:
        call: Call = job.payload
        compute_s = call.compute_s
        waited_s = ended_at - job.queued_at - compute_s
        done = Done(_joined(call.outputs), max(0.0, waited_s) * 1000, compute_s * 1000)
        answers.setdefault(call.loop, []).append((call.future, done))
    for loop, pairs in answers.items():
        _tell(loop, partial(_set_results, pairs))


def fail(calls: Sequence[Call], error: Exception) -> None:
    """Fail `calls`."""
    for call in calls:
        _tell(call.loop, partial(_set_error, call.future, error))


def _set_results(pairs: Sequence[tuple["asyncio.Future[Any]", Done[Any]]]) -> None:
    # A caller may have been cancelled in the meantime.
    for future, done in pairs:
        if not future.done():
            future.set_result(done)


def _set_error(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _tell(loop: asyncio.AbstractEventLoop, tell: Callable[[], object]) -> None:
    # A loop that was closed has nobody left who waits.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(tell)
