"""Whether another runtime may answer in place of eager: the same images through both, on load.

In float32 the largest difference of probabilities may be TOLERANCE, and the best class is the same wherever eager's two
best are further apart. OpenVINO reaches 1e-6 to 6e-6 (eleven networks, random weights, logits up to 10, 64 px).
On a CPU a row must also keep its bits in batches of every size and at other places (guarantee 5 of the design).
In bfloat16 and int8, which are asked for, the difference has no limit but is told: OpenVINO's is 5e-3 to 5e-2 at its
largest in bfloat16.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from services.inference.runtimes.turns import InTurns

TOLERANCE = 1e-5
NUM_IMAGES = 32
# Each size of the runtimes' buckets, and some that they fill up.
_BATCH_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 20, 23, 24, 28, 32)


class Refused(Exception):
    """A runtime that must not answer; the message says why."""


@dataclass(frozen=True)
class Drift:
    """How far probabilities are from eager's in float32, over NUM_IMAGES images and all classes."""

    largest: float = 0.0
    mean: float = 0.0


def check_pixels(image_size: int) -> Tensor:
    """Return uint8 (NUM_IMAGES, 3, S, S), the same each time: noise, flat colours, and shapes as photographs have them.

    The latter is noise of many scales added up, the coarse ones strongest, which is how the power of photographs falls.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(8, 3, image_size, image_size, generator=generator)
    flat = torch.rand(4, 3, 1, 1, generator=generator).expand(-1, -1, image_size, image_size)
    scenes = torch.zeros(NUM_IMAGES - 12, 3, image_size, image_size)
    side = 2
    while side <= image_size:
        octave = torch.randn(len(scenes), 3, side, side, generator=generator) / side
        scenes += F.interpolate(octave, size=image_size, mode="bilinear", align_corners=False)
        side *= 2
    low, high = scenes.amin((1, 2, 3), keepdim=True), scenes.amax((1, 2, 3), keepdim=True)
    return torch.cat([noise, flat, (scenes - low) / (high - low)]).mul(255).round().to(torch.uint8)


def check(runtime: InTurns, expected: Tensor, pixels: Tensor, on_cpu: bool) -> Drift:
    """Return how far `runtime` is from `expected`, eager's logits (N, C) for pixels; raise Refused if it is too far."""
    logits = runtime.predict(pixels)
    if logits.shape != expected.shape or not bool(logits.isfinite().all()):
        raise Refused(f"its logits are not finite numbers of the shape {tuple(expected.shape)}")
    # Larger ones run on streams where there are such.
    for size in (size for size in _BATCH_SIZES if size < (runtime.beside_from or len(logits) + 1)):
        _check_neighbours(runtime, logits, pixels, size, on_cpu)
    for size in runtime.beside_sizes:
        _check_streams(runtime, logits, pixels, size)
    return _drift(runtime.dtype, logits, expected)


def _check_neighbours(runtime: InTurns, logits: Tensor, pixels: Tensor, size: int, on_cpu: bool) -> None:
    # The last rows come first here: another place and other neighbours than in the whole.
    alone, among = runtime.predict(pixels[-size:]), logits[-size:]
    if on_cpu and not torch.equal(alone, among):
        raise Refused(f"its answers in a batch of {size} differ from those in a batch of {len(logits)}")


def _check_streams(runtime: InTurns, logits: Tensor, pixels: Tensor, size: int) -> None:
    """Raise Refused where a stream has other bits; each has then run a batch of `size`, and is ready for the next."""
    if any(not torch.equal(each, logits[-size:]) for each in runtime.on_each_stream(pixels[-size:])):
        raise Refused(f"its answers in a batch of {size} beside others differ from those in a batch of {len(logits)}")


def _drift(dtype: str, logits: Tensor, expected: Tensor) -> Drift:
    ours, eager = torch.softmax(logits, dim=1), torch.softmax(expected, dim=1)
    difference = (ours - eager).abs()
    drift = Drift(float(difference.max()), float(difference.mean()))
    if dtype != "float32":
        return drift
    if drift.largest > TOLERANCE:
        raise Refused(f"its probabilities differ from eager's by {drift.largest:.1e}; the tolerance is {TOLERANCE:.0e}")
    best = eager.topk(min(2, eager.shape[1]), dim=1).values
    clear = best[:, 0] - best[:, -1] > TOLERANCE
    if bool((ours.argmax(1) != eager.argmax(1))[clear].any()):
        raise Refused("it names another class than eager first")
    return drift
