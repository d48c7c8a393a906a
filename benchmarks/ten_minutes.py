"""What perplexity ten minutes on a CPU buy: the preset ten-minutes on WikiText-2, from the job spec to the test split.

`TANDEM_WIKITEXT=FOLDER python -m benchmarks ten_minutes`, with train.txt, valid.txt and test.txt. Another preset, or
values in its place, by `TANDEM_PRESET` and `TANDEM_VALUES` (JSON).
"""

import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from services.trainer.assembly import assemble
from services.trainer.engine.reports import EpochDone
from tandem.data.prepare import prepare_wikitext
from tandem.jobs.presets import load_preset
from tandem.jobs.spec import LanguageModelJob
from tandem.volume import Volume

PRESET = os.environ.get("TANDEM_PRESET", "ten-minutes")


def main() -> None:
    """Train, and print seconds, words/s and perplexities after each epoch, then those of the test split."""
    if "TANDEM_WIKITEXT" not in os.environ:
        print("left out: TANDEM_WIKITEXT names no folder with train.txt, valid.txt and test.txt")
        return
    with tempfile.TemporaryDirectory() as folder:
        volume = Volume(Path(folder))
        prepare_wikitext(volume, os.environ["TANDEM_WIKITEXT"], "wikitext-2")
        values = {**load_preset(PRESET), **json.loads(os.environ.get("TANDEM_VALUES", "{}"))}
        train(volume, LanguageModelJob.model_validate({"dataset": "wikitext-2", "model_name": "m", **values}))


def train(volume: Volume, spec: LanguageModelJob) -> None:
    """Train `spec` to its end."""
    began = time.perf_counter()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{PRESET}; {torch.get_num_threads()} threads, {versions}\n")
    job = assemble(spec, volume, "bench")
    print("| | seconds since the start | train ppl | valid ppl | test ppl |\n|---|---|---|---|---|", flush=True)
    for report in job.training.fit():
        if isinstance(report, EpochDone):
            row = (f"epoch {report.epoch}", f"{time.perf_counter() - began:.0f}")
            found = (f"{report.metrics[name]:.1f}" for name in ("train_ppl", "val_ppl"))
            print("|", " | ".join([*row, *found]), "| |", flush=True)
    # Of the last epoch, which the schedules here make the best.
    test = job.finish(None)
    print(f"| end | {time.perf_counter() - began:.0f} | | | {test['test_ppl']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
