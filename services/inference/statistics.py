"""What was done for the callers of each model: counts and durations, fed by the scheduler as calls and batches end.

Every call passes through `DeviceScheduler.admit`, whatever its protocol; its passage is timed there. Counts begin when
a version is loaded and go with it, as its lanes do. A call through two models (Compare) counts for both, with the
times of both.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import grpc

from services.inference.durations import Durations, Total
from services.inference.observation import Observed, current_call
from services.inference.text_statistics import TextPassage, TextStatistics
from tandem.errors import TandemError
from tandem.wire.status import status_code


class Timed(Protocol):
    """What comes back from the device."""

    @property
    def queue_ms(self) -> float:
        """Milliseconds that it waited."""
        ...

    @property
    def compute_ms(self) -> float:
        """Milliseconds that it ran, with what shared its batches."""
        ...


T = TypeVar("T", bound=Timed)

_COUNTED = (
    "success", "fail", "cancel", "codes", "queue", "compute_input", "compute_infer", "compute_output", "texts",
)  # fmt: skip


@dataclass(slots=True)
class ModelStatistics:
    """Of one version. Of the durations of parts, each successful call adds one; together they are that of `success`."""

    success: Durations = field(default_factory=Durations)
    # Refused, late, or ended by an error of the caller or of ours.
    fail: Total = field(default_factory=Total)
    # Given up by the caller.
    cancel: Total = field(default_factory=Total)
    # Both, by gRPC's name of how they ended.
    codes: dict[str, int] = field(default_factory=dict)
    # Waiting for the device.
    queue: Durations = field(default_factory=Durations)
    # Until the device was asked for: decoding and preprocessing.
    compute_input: Durations = field(default_factory=Durations)
    # The network.
    compute_infer: Durations = field(default_factory=Durations)
    # The rest: what is made of the answer; of a text also the waiting for its reader.
    compute_output: Total = field(default_factory=Total)
    # Images or texts of successful calls.
    num_items: int = 0
    # Seconds since 1970 at which the last call succeeded; 0 for never.
    last_success_at: float = 0.0
    # By the number of images: batches, or turns of texts.
    batches: dict[int, Total] = field(default_factory=dict)
    texts: TextStatistics = field(default_factory=TextStatistics)
    # Name and version in the registry, or the checkpoint; the one name of a model that metrics and logs know.
    label: str = ""

    @property
    def num_batches(self) -> int:
        """Batches in all."""
        return sum(total.count for total in self.batches.values())

    def ran(self, num_items: int, seconds: float) -> None:
        """Count a batch."""
        self.batches.setdefault(num_items, Total()).add(seconds)

    def failed(self, error: BaseException, is_late: bool, seconds: float) -> None:
        """Count a call that ended with `error`; `is_late` says that its deadline had passed."""
        code = _code_of(error, is_late)
        self.codes[code] = self.codes.get(code, 0) + 1
        is_given_up = isinstance(error, asyncio.CancelledError | GeneratorExit)
        (self.cancel if is_given_up else self.fail).add(seconds)

    def copy(self) -> "ModelStatistics":
        """Return a copy that does not change."""
        # Not by deepcopy, which takes 1.1 ms where this takes 0.03: the scheduler's lock is held for it.
        return replace(
            self,
            **{name: getattr(self, name).copy() for name in _COUNTED},
            batches={size: total.copy() for size, total in self.batches.items()},
        )

    def __add__(self, other: "ModelStatistics") -> "ModelStatistics":
        """Return both together: those of one model on two devices."""
        return ModelStatistics(
            **{name: getattr(self, name) + getattr(other, name) for name in _COUNTED if name != "codes"},
            codes={code: self.codes.get(code, 0) + other.codes.get(code, 0) for code in {**self.codes, **other.codes}},
            num_items=self.num_items + other.num_items,
            last_success_at=max(self.last_success_at, other.last_success_at),
            batches={
                size: self.batches.get(size, Total()) + other.batches.get(size, Total())
                for size in sorted({*self.batches, *other.batches})
            },
            label=self.label,
        )


class Passage:
    """The way of one call from admission to its end, through the models of `statistics`."""

    __slots__ = ("_asked_at", "_begun_at", "_call", "_compute_s", "_queue_s", "_statistics", "_texts")

    def __init__(self, statistics: Sequence[ModelStatistics] = ()) -> None:
        self._begun_at = time.monotonic()
        self._asked_at: float | None = None
        self._queue_s = self._compute_s = 0.0
        self._statistics = statistics
        self._texts: list[TextPassage] = []
        self._call: Observed | None = current_call()

    def asks(self) -> None:
        """Note that the device is asked for work."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            if self._call is not None and not self._texts:
                self._call.add_step("decode", self._begun_at, self._asked_at)

    def returned(self, done: T) -> T:
        """Note the times of what came back from the device, and return it."""
        queue_s, compute_s = done.queue_ms / 1000, done.compute_ms / 1000
        self._queue_s += queue_s
        self._compute_s += compute_s
        if not self._texts and self._call is not None:
            ended_at = time.monotonic()
            begun_at = ended_at - compute_s
            self._call.add_step("queue", begun_at - queue_s, begun_at)
            self._call.add_step("compute", begun_at, ended_at)
        return done

    def text(self, num_prompt_tokens: int) -> "TextPassage":
        """Return what is to be told of a text that this call writes."""
        text = TextPassage(self._statistics[0].texts, num_prompt_tokens, self._begun_at, self._call)
        self._texts.append(text)
        return text

    def end(self, num_items: int, error: BaseException | None, deadline: float | None = None) -> None:
        """Count the call, which ended with `error` (None: it succeeded)."""
        now = time.monotonic()
        total_s = now - self._begun_at
        # What was given up before the device was asked has been decoding until now.
        input_s = (now if self._asked_at is None else self._asked_at) - self._begun_at
        for text in self._texts:
            text.end()
        for statistics in self._statistics:
            if error is None:
                self._succeed(statistics, num_items, total_s, input_s)
            else:
                statistics.failed(error, deadline is not None and now >= deadline, total_s)
        if self._call is not None:
            labels = [statistics.label for statistics in self._statistics]
            self._call.passed(labels, num_items, input_s, self._queue_s, self._compute_s)

    def _succeed(self, statistics: ModelStatistics, num_items: int, total_s: float, input_s: float) -> None:
        statistics.success.add(total_s)
        statistics.queue.add(self._queue_s)
        statistics.compute_input.add(input_s)
        statistics.compute_infer.add(self._compute_s)
        statistics.compute_output.add(total_s - input_s - self._queue_s - self._compute_s)
        statistics.num_items += num_items
        statistics.last_success_at = time.time()


def _code_of(error: BaseException, is_late: bool) -> str:
    if isinstance(error, TandemError):
        return str(status_code(error).name)
    code = grpc.StatusCode.INTERNAL
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
    return str(code.name)
