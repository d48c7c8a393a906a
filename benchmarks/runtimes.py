"""Claims, for ResNet-18 at 64 px, 200 classes, float32 on a CPU: the runtime that `auto` picks answers one image in
half the time of eager or less, and a batch of 32 no slower.

The network's weights are random; images go in as uint8 pixels, logits come out. The runtimes take turns, size by size,
and ratios are taken turn by turn. "network" is the plain network in eager torch on pixels that are normalised already,
which for one image eager can't reach: it runs it twice over, to keep the bits of a row (see runtimes/eager.py).

TANDEM_BENCH_ROUNDS (20) shortens a look. TANDEM_BENCH_RUNTIMES (eager,compiled,openvino) leaves some out; compiled
takes up to a minute to compile. TANDEM_BENCH_PRECISION=bfloat16 is for a machine that has it.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Literal

from tandem.openmp import limit_spinning

# As the server does, before torch is loaded.
limit_spinning(os.environ)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from services.inference.runtimes.check import check_pixels  # noqa: E402
from services.inference.runtimes.selection import RuntimeSelector, shared_copy  # noqa: E402
from tandem.checkpoints.card import Preprocessing  # noqa: E402
from tandem.data.images import normalise  # noqa: E402
from tandem.models.classifiers import build_classifier  # noqa: E402

ROUNDS = int(os.environ.get("TANDEM_BENCH_ROUNDS", "20"))
NAMES = os.environ.get("TANDEM_BENCH_RUNTIMES", "eager,compiled,openvino").split(",")
SIDE, NUM_CLASSES, SIZES = 64, 200, (1, 8, 32)
PREPROCESSING = Preprocessing(resize=SIDE, image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

Predict = Callable[[Tensor], Tensor]


def main() -> None:
    """Print what is selected, and the table."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    network = trained()
    contenders: dict[str, Predict] = {"network": bare(shared_copy(network))}
    for name in NAMES:
        began = time.perf_counter()
        selector = RuntimeSelector(torch.device("cpu"), name, precision())
        selected = selector.select(shared_copy(network), PREPROCESSING)
        print(f"{name}, ready in {time.perf_counter() - began:.1f} s: {selected.reason}")
        contenders[name] = selected.runtime.predict
    print(f"\n| batch | runtime | images/s | p50 ms | of eager | n = {ROUNDS} rounds |\n|---|---|---|---|---|---|")
    for size in SIZES:
        print_size(contenders, check_pixels(SIDE)[:size])


def precision() -> Literal["float32", "bfloat16"]:
    """Return what is asked for."""
    return "bfloat16" if os.environ.get("TANDEM_BENCH_PRECISION") == "bfloat16" else "float32"


def trained(seed: int = 0) -> nn.Module:
    """Return a network with sensible statistics of BatchNorm, in eval mode."""
    torch.manual_seed(seed)
    network = build_classifier("resnet18", NUM_CLASSES, SIDE)
    with torch.no_grad():
        network.train()(normalise(check_pixels(SIDE), PREPROCESSING))
    return network.eval().requires_grad_(False)


def bare(network: nn.Module) -> Predict:
    """Return the plain network, its input ready."""
    ready = normalise(check_pixels(SIDE), PREPROCESSING)

    @torch.inference_mode()
    def predict(pixels: Tensor) -> Tensor:
        logits: Tensor = network(ready[: len(pixels)])
        return logits

    return predict


def print_size(contenders: dict[str, Predict], pixels: Tensor) -> None:
    """Print a row for each runtime."""
    rounds = [{name: seconds(predict, pixels) for name, predict in contenders.items()} for _ in range(ROUNDS + 2)][2:]
    for name in contenders:
        took = statistics.median(each[name] for each in rounds)
        ratio = statistics.median(each["eager"] / each[name] for each in rounds) if "eager" in contenders else 0.0
        print(f"| {len(pixels)} | {name} | {len(pixels) / took:,.0f} | {took * 1000:.2f} | {ratio:.2f} | |", flush=True)


def seconds(predict: Predict, pixels: Tensor) -> float:
    """Return the wall time of one call."""
    began = time.perf_counter()
    predict(pixels)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
