"""Which runtime answers for a classifier: the fastest of those that pass the check against eager.

On a CPU `auto` tries OpenVINO. torch.compile takes a minute of both cores for a network there, and is slower at every
batch size; it must be asked for, and so must eager in bfloat16, which takes 1.4 s for one image of MobileNet v3. On a
GPU `auto` tries compiled. int8 is OpenVINO's alone, and must be asked for too. Language models run eager.
"""

import copy
import logging
import math
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from services.inference.memory import taken_on, tensor_bytes
from services.inference.runtimes.check import NUM_IMAGES, Drift, Refused, check, check_pixels
from services.inference.runtimes.compiled import CompiledClassifier, has_cpp_compiler
from services.inference.runtimes.eager import EagerClassifier, check_finite
from services.inference.runtimes.int8 import Calibration, quantised
from services.inference.runtimes.interface import ClassifierRuntime, Precision
from services.inference.runtimes.openvino import GraphCache, OpenVinoClassifier
from services.inference.runtimes.pixels import FromPixels
from services.inference.runtimes.turns import InTurns, Turns, at_once
from tandem.checkpoints.card import Preprocessing
from tandem.errors import InvalidRequest
from tandem.models.devices import resolve_precision

# A single call, and a full batch.
TIMED_SIZES = (1, 32)
# For each of the two; every runtime is timed once at the least.
TIME_LIMIT_S = 1.0
_MAX_TURNS = 15
_EAGER_PIECE = 8
# Networks of a structure take the same, but what others do meanwhile is measured with it: the median of so many counts.
_NUM_MEASURED = 5
_NUM_STRUCTURES = 256

log = logging.getLogger("tandem.inference.runtimes")

# Median milliseconds by runtime's name, at TIMED_SIZES.
Times = Mapping[str, tuple[float, ...]]
# A network's modules and its image size.
Structure = tuple[str, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Selected:
    """The runtime that answers, why it does, and its drift; `eager` in float32 stays beside it, for Compare."""

    runtime: ClassifierRuntime
    eager: ClassifierRuntime
    reason: str
    drift: Drift
    # Each row was seen to keep its bits in batches of every size.
    keeps_rows: bool = False
    # What it all takes on the device: the network, and whatever the runtimes made of it.
    num_bytes: int = 0


@dataclass(frozen=True)
class _Passed:
    runtime: ClassifierRuntime
    drift: Drift
    keeps_rows: bool = False


@dataclass(frozen=True)
class _Trial:
    """How a network is tried out: see `select`."""

    turns: Turns
    calibration: Calibration | None


class RuntimeSelector:
    """Selects for networks on `device`. Used by several threads; two networks are never timed at once."""

    def __init__(self, device: torch.device, engine: str = "auto", precision: Precision = "float32") -> None:
        """Raise InvalidRequest for an engine or a precision that this device or machine does not have."""
        check_available(device, engine, precision)
        self._device = device
        self._precision = precision
        self._names = engines(device, engine, precision)
        self._is_free_choice = engine == "auto"
        # Each thread has its own setting; a new one's is not that of the thread that counts cores here.
        self._num_threads = torch.get_num_threads()
        self._graphs = GraphCache()
        self._lock = threading.Lock()
        # In memory: another machine on the same volume has other times, and they take 2 s once for each structure.
        self._times: OrderedDict[Structure, Times] = OrderedDict()
        # One network at a time, or the memory of one would be taken for that of another.
        self._building = threading.Lock()
        self._grown: OrderedDict[Structure, list[int]] = OrderedDict()

    def select(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        turns: Turns = at_once,
        calibration: Calibration | None = None,
    ) -> Selected:
        """Return how `network`, in eval mode, is to be run; it is taken over. Raise CheckpointCorrupt if it can't be.

        Runs every size of batch of what it tries, in `turns` of the device. `calibration` returns the images that int8
        is fitted to; without it they are made up.
        """
        structure = repr(network), preprocessing.image_size
        own = tensor_bytes(network)
        with self._building:
            before = taken_on(self._device)
            selected = self._select(network, preprocessing, structure, _Trial(turns, calibration))
            grown = taken_on(self._device) - before
        return replace(selected, num_bytes=self._num_bytes(structure, own, grown))

    def _num_bytes(self, structure: Structure, own: int, grown: int) -> int:
        # On the CPU the network itself was there before; on another device it is part of what came.
        measured = [*self._grown.get(structure, ()), own + grown if self._device.type == "cpu" else grown]
        _keep(self._grown, structure, measured[-_NUM_MEASURED:])
        return max(own, statistics.median_low(self._grown[structure]))

    def _select(
        self, network: nn.Module, preprocessing: Preprocessing, structure: Structure, trial: "_Trial"
    ) -> Selected:
        # What the device's thread has; compiled code is made for one number of threads.
        torch.set_num_threads(max(2, self._num_threads))
        eager = EagerClassifier(shared_copy(network), preprocessing, self._device)
        pixels = check_pixels(preprocessing.image_size)
        # In small pieces: each takes the whole device from callers, and all at once would for 0.2 s.
        expected = torch.cat(
            [InTurns(eager, trial.turns).predict(piece) for piece in torch.split(pixels, _EAGER_PIECE)]
        )
        check_finite(expected)
        passed: dict[str, _Passed] = {}
        refused: list[str] = []
        for name in self._names:
            try:
                runtime = self._build(name, network, eager, preprocessing, trial.calibration)
                on_cpu = self._device.type == "cpu"
                passed[name] = _Passed(runtime, check(InTurns(runtime, trial.turns), expected, pixels, on_cpu), on_cpu)
            except Refused as reason:
                refused.append(f"{name} is refused: {reason}")
            except ImportError as error:
                refused.append(f"{name} is not installed ({error})")
            except Exception as error:
                # Whatever a compiler can't do with a network, eager answers.
                log.info("%s can't run this network", name, exc_info=error)
                refused.append(f"{name} can't run this network ({type(error).__name__})")
        return self._choose(eager, passed, refused, structure, pixels, trial.turns)

    def _build(
        self,
        name: str,
        network: nn.Module,
        eager: EagerClassifier,
        preprocessing: Preprocessing,
        calibration: Calibration | None,
    ) -> ClassifierRuntime:
        size = preprocessing.image_size
        if name == "openvino":
            graph = self._graphs.graph(FromPixels(network, preprocessing), size)
            if self._precision == "int8":
                graph = quantised(graph, calibration() if calibration is not None else check_pixels(size))
            return OpenVinoClassifier(graph, size, self._precision, self._num_threads)
        if self._precision != "float32":
            eager = EagerClassifier(copy.deepcopy(network), preprocessing, self._device, self._precision)
        return eager if name == "eager" else CompiledClassifier(eager, size, self._device)

    def _choose(
        self,
        eager: EagerClassifier,
        passed: dict[str, _Passed],
        refused: list[str],
        structure: Structure,
        pixels: Tensor,
        turns: Turns,
    ) -> Selected:
        if not passed:
            why = "; ".join(refused) or "it was asked for"
            return Selected(eager, eager, f"eager in float32: {why}", Drift())
        if self._precision == "float32" and self._is_free_choice:
            passed = {**passed, "eager": _Passed(eager, Drift())}
        times: Times = {}
        if len(passed) > 1:
            tried = {name: InTurns(each.runtime, turns) for name, each in passed.items()}
            times = self._timed(structure, tried, pixels)
        name = min(passed, key=lambda each: math.prod(times.get(each, ())))
        chosen = passed[name]
        reason = "; ".join([_reason(name, times, chosen.drift), *refused])
        return Selected(chosen.runtime, eager, reason, chosen.drift, chosen.keeps_rows)

    def _timed(self, structure: Structure, runtimes: Mapping[str, ClassifierRuntime], pixels: Tensor) -> Times:
        with self._lock:
            times = self._times.get(structure, {})
            if not runtimes.keys() <= times.keys():
                times = _keep(self._times, structure, measure(runtimes, pixels))
        return times


def _keep(table: OrderedDict[Structure, T], structure: Structure, value: T) -> T:
    """Put `value` into a table of the structures that came last."""
    table[structure] = value
    table.move_to_end(structure)
    if len(table) > _NUM_STRUCTURES:
        table.popitem(last=False)
    return value


def engines(device: torch.device, engine: str, precision: Precision) -> tuple[str, ...]:
    """Return the runtimes to try beside eager in float32, which is always there."""
    if precision == "int8":
        return ("openvino",)
    if engine != "auto":
        return () if engine == "eager" and precision == "float32" else (engine,)
    return ("openvino",) if device.type == "cpu" else ("compiled",)


def check_available(device: torch.device, engine: str, precision: Precision) -> None:
    """Raise InvalidRequest where TANDEM_ENGINE or TANDEM_PRECISION asks for what can't be had here."""
    asked = f"TANDEM_ENGINE={engine}"
    if engine == "openvino" and device.type != "cpu":
        raise InvalidRequest(f"{asked} runs on the CPU, not on {device}: set TANDEM_DEVICE=cpu, or TANDEM_ENGINE=auto")
    if engine == "openvino" and find_spec("openvino") is None:
        raise InvalidRequest(f"{asked}: the package openvino is not installed; install it, or set TANDEM_ENGINE=auto")
    if engine == "compiled" and device.type == "cpu" and not has_cpp_compiler():
        raise InvalidRequest(f"{asked}: there is no C++ compiler (g++) on PATH; install one, or set TANDEM_ENGINE=auto")
    assert precision in get_args(Precision)
    if precision == "int8" and (device.type != "cpu" or engine not in ("auto", "openvino")):
        raise InvalidRequest(
            "TANDEM_PRECISION=int8 is OpenVINO's, on a CPU: set TANDEM_DEVICE=cpu and TANDEM_ENGINE=auto, or "
            "TANDEM_PRECISION=float32"
        )
    if precision == "int8" and find_spec("nncf") is None:
        raise InvalidRequest("TANDEM_PRECISION=int8: the package nncf is not installed; install it")
    if precision == "bfloat16" and resolve_precision("auto", device) != "bfloat16":
        raise InvalidRequest(
            f"TANDEM_PRECISION=bfloat16: {device} has no instructions for it; set TANDEM_PRECISION=float32"
        )


def shared_copy(network: nn.Module) -> nn.Module:
    """Return a copy of the modules of `network` around the same parameters and buffers."""
    tensors = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def measure(runtimes: Mapping[str, ClassifierRuntime], pixels: Tensor) -> Times:
    """Return the median milliseconds of each runtime at TIMED_SIZES, in turns, since the machine's load changes."""
    by_size = [_measure_size(runtimes, pixels[:size]) for size in TIMED_SIZES]
    return {name: tuple(times[name] for times in by_size) for name in runtimes}


def _measure_size(runtimes: Mapping[str, ClassifierRuntime], pixels: Tensor) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in runtimes}
    ends_at = time.monotonic() + TIME_LIMIT_S
    for _ in range(_MAX_TURNS):
        for name, runtime in runtimes.items():
            began = time.perf_counter()
            runtime.predict(pixels)
            took[name].append((time.perf_counter() - began) * 1000)
        if time.monotonic() > ends_at:
            break
    return {name: statistics.median(each) for name, each in took.items()}


def _reason(name: str, times: Times, drift: Drift) -> str:
    parts = []
    if name in times:
        others = [f"{other} {_milliseconds(times[other])}" for other in times if other != name]
        sizes = " and ".join(map(str, TIMED_SIZES))
        parts.append(f"{_milliseconds(times[name])} ms for {sizes} images, against {', '.join(others)} ms")
    if drift != Drift():
        parts.append(f"probabilities within {drift.largest:.1e} of eager's in float32 over {NUM_IMAGES} images")
    return f"{name}: " + "; ".join(parts or ["the only one tried"])


def _milliseconds(times: Sequence[float]) -> str:
    return " and ".join(f"{each:.2f}" for each in times)
