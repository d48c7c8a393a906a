"""The bare work of a comparison, in one process: decode by all cores, then two networks by all cores, batch by batch.

`python -m benchmarks.serving.compare_limit DATASET_FOLDER` answers each `pass` on standard input with the seconds that
one pass over the split `val` took.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tandem.openmp import limit_spinning

limit_spinning(os.environ)


def main() -> None:
    """Answer commands."""
    import torch

    from benchmarks.runtimes import PREPROCESSING, trained
    from services.inference.runtimes.pixels import FromPixels
    from services.inference.scheduler import MAX_BATCH
    from tandem.data.images import decode_image, resize_and_crop
    from tandem.data.manifest import read_index
    from tandem.models.devices import configure_device, resolve_device

    device = resolve_device(os.environ.get("TANDEM_DEVICE", "auto"))
    configure_device(device)
    directory = Path(sys.argv[1])
    paths = [directory / file for file, _ in read_index(directory, "val")]
    networks = [FromPixels(trained(seed), PREPROCESSING).to(device) for seed in (0, 1)]
    workers = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def decode(some: list[Path]) -> list[torch.Tensor]:
        return [resize_and_crop(decode_image(path.read_bytes()), PREPROCESSING) for path in some]

    @torch.inference_mode()
    def run(some: list[Path]) -> None:
        parts = pool.map(decode, [some[first::workers] for first in range(workers)])
        pixels = torch.stack([each for part in parts for each in part]).to(device)
        for network in networks:
            network(pixels).cpu()

    for _ in sys.stdin:
        began = time.perf_counter()
        for first in range(0, len(paths), MAX_BATCH):
            run(paths[first : first + MAX_BATCH])
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
