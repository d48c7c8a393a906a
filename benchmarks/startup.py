"""Claim: `tandem --help` answers in under 0.4 s, and `tandem runs list`, with 100 runs on the volume, in under 0.7 s.

Whole processes, wall time, one after another; the first of each is a warm-up and not counted.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tandem.jobs import record as machine
from tandem.jobs.record import JobRecord, Progress
from tandem.jobs.runs import mirror
from tandem.volume import Volume

NUM_RUNS = 100
N = 20


def main() -> None:
    """Print the median, least and greatest time of each command."""
    with tempfile.TemporaryDirectory() as folder:
        volume = Volume(Path(folder))
        write_runs(volume)
        print(f"| command | median s | min | max | n = {N} |\n|---|---|---|---|---|")
        for arguments in (["--help"], ["runs", "list"], ["runs", "list", "--json"], ["models", "list"]):
            times = [seconds(arguments, volume.home) for _ in range(N + 1)][1:]
            row = (statistics.median(times), min(times), max(times))
            print(f"| tandem {' '.join(arguments)} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} | |")


def write_runs(volume: Volume) -> None:
    """Write the records of finished runs."""
    for number in range(NUM_RUNS):
        run_id = f"20260101-0000{number:02d}-abcdef"
        volume.run(run_id).mkdir(parents=True)
        at = machine.now()
        record = JobRecord(
            run_id=run_id, kind="train_classifier", dataset="d", model_name="m", queue="default",
            submitted_at=at, updated_at=at, progress=Progress(step=9, num_steps=9, metrics={"val_loss": 1.0}),
        )  # fmt: skip
        mirror(volume, machine.finish(machine.start(record), model_version=1), durable=False)


def seconds(arguments: list[str], home: Path) -> float:
    """Return the wall time of one `tandem` command."""
    environment = {**os.environ, "TANDEM_HOME": str(home)}
    command = [str(Path(sys.executable).with_name("tandem")), *arguments]
    began = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
