"""What the machine can write without a server: texts stepped together in one process, in a loop.

`python -m benchmarks.serving.text_limit HOME MODEL` takes commands from standard input and answers each with a line:
`rate N S` with the words a second of N texts over S seconds, `step N S` with the median milliseconds of a step of N.
"""

import os
import statistics
import sys
from pathlib import Path

from tandem.openmp import limit_spinning

limit_spinning(os.environ)


def main() -> None:
    """Answer commands."""
    from services.inference.bench import Words
    from services.inference.loading import as_language_model, load
    from services.inference.runtimes.selection import RuntimeSelector
    from tandem.checkpoints.registry import Registry
    from tandem.models.devices import configure_device, resolve_device
    from tandem.volume import Volume

    device = resolve_device(os.environ.get("TANDEM_DEVICE", "auto"))
    configure_device(device)
    located = Registry(Volume(Path(sys.argv[1]))).resolve(sys.argv[2])
    words = Words(as_language_model(load(located, [device], [RuntimeSelector(device, "auto")])))
    for line in sys.stdin:
        name, count, seconds = line.split()
        took = words.took(int(count), float(seconds))
        print(int(count) * len(took) / sum(took) if name == "rate" else statistics.median(took) * 1000, flush=True)


if __name__ == "__main__":
    main()
