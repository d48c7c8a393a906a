"""What the machine can do without a server: decode and the fastest runtime, in one process, in a loop.

`python -m benchmarks.serving.limit FOLDER` takes commands from standard input and answers each with a line: `rate B S`
with the images/s of batches of B over S seconds, decoded by all cores and then computed by all cores, which leaves
nothing of them idle but for the changes; `latency S` with the median milliseconds of one image after another.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tandem.openmp import limit_spinning

limit_spinning(os.environ)


def main() -> None:
    """Answer commands."""
    import torch

    from benchmarks.runtimes import PREPROCESSING, trained
    from services.inference.calls import rank
    from services.inference.runtimes.selection import RuntimeSelector
    from tandem.data.images import decode_image, resize_and_crop
    from tandem.models.devices import configure_device, resolve_device

    device = resolve_device(os.environ.get("TANDEM_DEVICE", "auto"))
    configure_device(device)
    selected = RuntimeSelector(device, "auto").select(trained(), PREPROCESSING)
    images = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
    workers = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def decode(some: list[bytes]) -> list[torch.Tensor]:
        return [resize_and_crop(decode_image(data), PREPROCESSING) for data in some]

    def once(first: int, size: int) -> None:
        some = [images[(first + number) % len(images)] for number in range(size)]
        if size == 1:
            pixels = torch.stack(decode(some))
        else:
            pixels = torch.stack([each for part in pool.map(decode, _parts(some, workers)) for each in part])
        rank(selected.runtime.predict(pixels), 5).indices.tolist()

    print(selected.reason.partition(":")[0], flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        if name == "rate":
            print(_rate(once, int(numbers[0]), float(numbers[1])), flush=True)
        else:
            print(_latency_ms(once, float(numbers[0])), flush=True)


def _parts(some: list[bytes], count: int) -> list[list[bytes]]:
    return [some[first::count] for first in range(count)]


def _rate(once: Callable[[int, int], None], size: int, seconds: float) -> float:
    once(0, size)
    began, done = time.perf_counter(), 0
    while (now := time.perf_counter()) < began + seconds:
        once(done, size)
        done += size
    return done / (now - began)


def _latency_ms(once: Callable[[int, int], None], seconds: float) -> float:
    took: list[float] = []
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        once(len(took), 1)
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


if __name__ == "__main__":
    main()
