"""Claims, on 2 CPU cores in float32; ratios are taken turn by turn in one run:

classify   ResNet-18 at 64 px: 32 images a message reach 0.95 of what one process can do without a server (decode and
           fastest runtime at its best batch); single images, 32 in flight, 0.85, and 1.5 times a plain grpc.aio server
           with eager torch and a simple batcher; one call in flight takes at most 0.6 ms longer than in process.
generate   LSTM and Transformer (200 wide, 33,278 words): 1, 8 and 32 streams get 0.85 of the words that one process
           writes without a server, texts stepped together; at 32 the first word comes within 3 steps (median).
compare    CompareDataset of two ResNet-18, 10,000 images of 64 px: at most 1.10 times as long as the bare work in one
           process, a decode and two eager forward passes at the same batch size.
overload   At 3 times its capacity the server answers 0.9 of its peak within the deadline, and its memory stays flat.
swap       50 versions published under load: no call fails, p99 at most twice the undisturbed one.
soak       A quarter of an hour of mixed load, loads and unloads: at its end 1.05 of the memory after the warm-up.

TANDEM_DEVICE=cuda measures server and limit on a GPU, where the limit is the bare compiled model.
TANDEM_BENCH_ROUNDS (5), TANDEM_BENCH_SECONDS (5) and TANDEM_BENCH_IMAGES (10000, of compare) shorten a look.
"""

import importlib
import os
import sys

PARTS = ("classify", "generate", "compare", "overload", "swap", "soak")


def main(parts: tuple[str, ...] = ()) -> None:
    """Run the named parts, or all."""
    rounds = int(os.environ.get("TANDEM_BENCH_ROUNDS", "5"))
    seconds = float(os.environ.get("TANDEM_BENCH_SECONDS", "5"))
    for part in parts or sys.argv[1:] or PARTS:
        print(f"\n### {part}\n", flush=True)
        importlib.import_module(f"benchmarks.serving.{part}").main(rounds, seconds)
