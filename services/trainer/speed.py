"""How fast a classifier trains: the loop in turns with its bare step, and where the time of a step goes."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from services.trainer.assembly import assemble
from services.trainer.engine.batches import WholeBatches
from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.optimizer_state import decayed_groups
from services.trainer.engine.precision import autocast
from services.trainer.engine.ranks import ALONE, Ranks
from services.trainer.engine.reports import EpochDone, Report, StepDone
from tandem.errors import InvalidRequest
from tandem.jobs.spec import ClassifierJob
from tandem.volume import Volume

PARTS = ("data", "forward", "backward", "update", "communication", "other")
# Of an epoch whose batches nobody makes ahead: loop and bare step take turns within it.
_TURNS = 5
_WARM_UP_STEPS = 3
# Steps with a clock at the borders of their parts; on a GPU they wait for it there, so they are none of the others.
_TIMED_STEPS = 24
_EXCHANGE_STEPS = 4
_LEAST_STEPS = 4


@dataclass(frozen=True)
class Row:
    """What training on one device took.

    - `seconds`: training steps of `epochs` epochs, without evaluation, `warm_up_s` (the first steps) or bare steps.
    - `images_per_s` of those steps; `bare_images_per_s` and `ratio`: medians over `num_turns` turns of both.
    - `shares` of a step by `PARTS`, which sum to 1, over `num_timed` steps of their own.
    """

    device: str
    num_processes: int
    num_threads: int
    precision: str
    image_size: int
    seconds: float
    epochs: int
    num_images: int
    images_per_s: float
    bare_images_per_s: float
    ratio: float
    num_turns: int
    shares: dict[str, float]
    num_timed: int


@dataclass(frozen=True)
class Turn:
    """Seconds of `num_steps` steps of the loop, with `num_images` images, and of as many bare steps."""

    num_steps: int
    num_images: int
    seconds: float
    bare_s: float


Clock = Callable[[], float]


def device_clock(device: torch.device) -> Clock:
    """Return a clock in seconds that waits for what `device` has been given to do."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


class BareStep:
    """Forward, backward and update on one batch that is ready, by a copy of a training's network: what can be reached.

    The same weights at the start, optimizer, precision and memory format; each process its share of the batch.
    """

    def __init__(self, training: ClassifierTraining, image_size: int) -> None:
        spec, device = training.spec, training.device
        self._precision, self._device, self._smoothing = training.evaluator.precision, device, spec.label_smoothing
        self.network = network = copy.deepcopy(training.network).train()
        self.num_images = spec.batch_size // training.ranks.size
        self._optimizer = torch.optim.SGD(
            decayed_groups(network, spec.weight_decay, spec.decay_all),
            lr=1e-4,
            momentum=spec.momentum,
            nesterov=spec.nesterov and spec.momentum > 0,
            fused=device.type == "cuda",
        )
        self._forward: Any = DistributedDataParallel(network) if training.ranks.size > 1 else network
        alone: Any = self._forward.no_sync if training.ranks.size > 1 else nullcontext
        self._no_sync: Callable[[], Any] = alone
        images = torch.randn(self.num_images, 3, image_size, image_size, device=device)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.arange(self.num_images, device=device) % (1 + int(training.val.labels.max()))

    def __call__(self, exchange: bool = False) -> None:
        """Do one step; with `exchange` the processes average their gradients."""
        with nullcontext() if exchange else self._no_sync():
            with autocast(self._device, self._precision):
                logits = self._forward(self._images)
            loss = F.cross_entropy(logits.float(), self._labels, label_smoothing=self._smoothing)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def seconds(self, count: int, exchange: bool = False) -> float:
        """Return the seconds of `count` steps."""
        now = device_clock(self._device)
        began = now()
        for _ in range(count):
            self(exchange)
        return now() - began


class PartTimer:
    """Adds up the seconds of the parts of steps: a `ClassifierTraining.timer`."""

    def __init__(self, now: Clock) -> None:
        self._now = now
        self._seconds = dict.fromkeys(("data", "forward", "backward", "update"), 0.0)
        self._total, self._waiting = 0.0, False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enclose a step; what passes until its first part is the wait for data (with its way to the device)."""
        self._began, self._waiting = self._now(), True
        yield
        self._total += self._now() - self._began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Enclose a part of a step."""
        began = self._now()
        if self._waiting:
            self._seconds["data"] += began - self._began
            self._waiting = False
        yield
        self._seconds[name] += self._now() - began

    def shares(self, communication_s: float = 0.0) -> dict[str, float]:
        """Return the share of each of `PARTS`; `communication_s` seconds of the backward parts are communication."""
        seconds = {**self._seconds, "communication": min(max(communication_s, 0.0), self._seconds["backward"])}
        seconds["backward"] -= seconds["communication"]
        seconds["other"] = max(self._total - sum(seconds.values()), 0.0)
        whole = sum(seconds.values())
        return {name: seconds[name] / whole for name in PARTS}


def measure(spec: ClassifierJob, volume: Volume, name: str, ranks: Ranks = ALONE) -> Row:
    """Train `spec` on its device for its epochs, in turns with the bare step; then time the parts of some steps."""
    training = assemble(spec, volume, "bench", ranks).training
    assert isinstance(training, ClassifierTraining)
    if training.steps_per_epoch < _LEAST_STEPS:
        raise InvalidRequest(
            f"an epoch of {training.steps_per_epoch} steps is too short to measure; raise --limit-train-images or "
            f"lower --batch-size, so that there are {_LEAST_STEPS}"
        )
    image_size = training.evaluator.preprocessing.image_size
    bare = BareStep(training, image_size)
    _warm_up(training, bare)
    turns = list(_turns(training, bare))
    shares, num_timed = _shares(training, bare)
    images, seconds = sum(each.num_images for each in turns), sum(each.seconds for each in turns)
    batch_size = bare.num_images * ranks.size
    return Row(
        device=name,
        num_processes=ranks.size,
        num_threads=torch.get_num_threads(),
        precision=training.evaluator.precision,
        image_size=image_size,
        seconds=seconds,
        epochs=spec.epochs,
        num_images=images,
        images_per_s=images / seconds,
        bare_images_per_s=statistics.median(batch_size * each.num_steps / each.bare_s for each in turns),
        ratio=statistics.median(ratio_of(each, batch_size) for each in turns),
        num_turns=len(turns),
        shares=shares,
        num_timed=num_timed,
    )


def ratio_of(turn: Turn, batch_size: int) -> float:
    """Return images/s of the loop over those of the bare step; a last, smaller batch counts as what it is."""
    return turn.num_images / turn.seconds * turn.bare_s / (batch_size * turn.num_steps)


def _warm_up(training: ClassifierTraining, bare: BareStep) -> None:
    bare.seconds(_WARM_UP_STEPS)
    for _ in _steps(training.fit(), min(_WARM_UP_STEPS, training.steps_per_epoch)):
        pass
    _rewind(training)


def _rewind(training: ClassifierTraining) -> None:
    training.step = training.finished_epochs = 0


def _steps(reports: Iterator[Report], count: int) -> Iterator[StepDone]:
    return (report for report in islice(reports, count) if isinstance(report, StepDone))


def _turns(training: ClassifierTraining, bare: BareStep) -> Iterator[Turn]:
    """Train all epochs, each in turns with as many bare steps; evaluations are outside."""
    now, loop = device_clock(training.device), training.fit()
    for _ in range(training.spec.epochs):
        left = training.steps_per_epoch
        longest = math.ceil(left / _turns_in_epoch(training))
        while left:
            count = min(left, longest)
            bare_s = bare.seconds(count)
            began = now()
            images = sum(report.num_examples for report in _steps(loop, count))
            yield Turn(count, images, now() - began, bare_s)
            left -= count
        next(report for report in loop if isinstance(report, EpochDone))


def _turns_in_epoch(training: ClassifierTraining) -> int:
    # Loader processes would work on during a bare turn, and the loop find more batches made than it has paid for.
    makes_ahead = not isinstance(training.batches, WholeBatches)
    return 1 if makes_ahead else min(_TURNS, training.steps_per_epoch)


def _shares(training: ClassifierTraining, bare: BareStep) -> tuple[dict[str, float], int]:
    """Return where the time of some further steps goes, and how many they were."""
    _rewind(training)
    count = min(_TIMED_STEPS, training.steps_per_epoch - 1)
    timer, loop = PartTimer(device_clock(training.device)), training.fit()
    # The first step also shuffles and starts what makes the batches.
    next(loop)
    training.timer = timer.part
    for _ in range(count):
        with timer.step():
            next(loop)
    return timer.shares(count * _exchange_s(training, bare)), count


def _exchange_s(training: ClassifierTraining, bare: BareStep) -> float:
    """Return the seconds by which a step with the gradients exchanged is longer than one without; 0 for one process."""
    if training.ranks.size == 1:
        return 0.0
    pairs = [[bare.seconds(_EXCHANGE_STEPS, exchange) for exchange in (True, False)] for _ in range(_TURNS)]
    return statistics.median(both - alone for both, alone in pairs) / _EXCHANGE_STEPS
