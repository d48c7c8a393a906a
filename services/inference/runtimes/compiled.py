"""Classifiers through torch.compile: C++ on a CPU; on a GPU Triton kernels, with a CUDA graph for each size of batch.

Each size is compiled with its shapes fixed when it first comes, which the check on load sees to: about 20 s a network
on two CPU cores the first time, less once torch's cache on disk has it. On the CPU the network is the eager one, with
its heads in blocks and a single image as two (see `eager`), so that rows keep their bits.

The graphs are captured here rather than by torch.compile's own mode for it, whose trees of graphs belong to the thread
that made them (pytorch #123177): models are loaded on one thread and run on another.
"""

from dataclasses import dataclass
from shutil import which

import torch
from torch import Tensor

from services.inference.runtimes.eager import EagerClassifier, check_finite
from services.inference.runtimes.pixels import in_buckets

# On a CPU each one costs seconds of the C++ compiler. Never one image alone: torch has other kernels for it.
CPU_SIZES = (2, 8, 32)
CUDA_SIZES = (1, 2, 4, 8, 16, 32)
# Before a capture: kernels are compiled and chosen, and libraries set up, in the first calls.
_CALLS_BEFORE_CAPTURE = 3


def has_cpp_compiler() -> bool:
    """Return whether there is a C++ compiler, which torch.compile calls on a CPU."""
    return any(which(name) for name in ("g++", "c++", "clang++"))


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph that writes `logits` for what lies in `pixels`."""

    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    logits: Tensor

    def run(self, pixels: Tensor) -> Tensor:
        self.pixels.copy_(pixels)
        self.graph.replay()
        return self.logits.cpu()


class CompiledClassifier:
    """The network of `eager` (which may go on being used beside it), compiled for its device."""

    name = "compiled"

    def __init__(self, eager: EagerClassifier, image_size: int, device: torch.device) -> None:
        self.dtype = eager.dtype
        self._image_size = image_size
        self._device = device
        self._network = torch.compile(eager.network, dynamic=False)
        self._captured: dict[int, _Captured] = {}

    @torch.inference_mode()
    def predict(self, pixels: Tensor) -> Tensor:
        """Return logits float32 (B, C) on the CPU for pixels uint8 (B, 3, S, S), B ≥ 1."""
        if self._device.type == "cuda":
            return in_buckets(pixels, CUDA_SIZES, self._replay)
        return in_buckets(pixels, CPU_SIZES, self._network)

    def warm(self) -> None:
        """Run once; raise CheckpointCorrupt if the answer is not finite."""
        check_finite(self.predict(torch.zeros(1, 3, self._image_size, self._image_size, dtype=torch.uint8)))

    def _replay(self, pixels: Tensor) -> Tensor:
        size = pixels.shape[0]
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        return self._captured[size].run(pixels)

    def _capture(self, size: int) -> _Captured:
        side = self._image_size
        pixels = torch.zeros(size, 3, side, side, dtype=torch.uint8, device=self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_CALLS_BEFORE_CAPTURE):
                self._network(pixels)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other models are served meanwhile, on another thread: their calls are no part of this graph, and no error.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            logits = self._network(pixels)
        return _Captured(graph, pixels, logits)
