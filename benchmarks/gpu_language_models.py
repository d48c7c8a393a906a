"""Claims, for WikiText-2 on one GPU (data preparation apart):

1. the preset compat-transformer, the report's set-up, takes less than 20 s for its 6 epochs (the report: 45 s each) and
   ends with a test perplexity below 192.94;
2. the best preset reaches a plain test perplexity below 80 within 15 minutes: awd-lstm and modern-transformer, in as
   many epochs as `--epochs` says;
3. a run that is interrupted at a random step and continued ends in the bytes of one that was not;
and words/s of each, and what the cache and dynamic evaluation make of the better one.

One command: `python -m benchmarks.gpu_language_models --source FOLDER`, with train.txt, valid.txt and test.txt (or
TANDEM_WIKITEXT). Seconds count from the job spec to the end: opening the data, training, evaluation after each epoch,
and the test split with the best weights. It needs no broker. `--smoke` runs all of it on few words, on any device.
"""

import argparse
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, print_figure, print_header
from services.trainer.assembly import assemble
from services.trainer.computing import run_attempt
from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.reports import EpochDone, StepDone
from tandem.checkpoints.tensors import from_bytes, to_bytes
from tandem.data.prepare import prepare_text, prepare_wikitext
from tandem.jobs.presets import load_preset
from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import LanguageModelJob
from tandem.models.devices import resolve_device
from tandem.models.weights import bare_state, load_weights
from tandem.volume import Volume

_SMOKE = {"limit_train_tokens": 2000, "limit_val_tokens": 300, "batch_size": 4, "bptt": 10, "context_length": None}
_SMALL = {"embedding_size": 16, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
_RESUME = {"limit_train_tokens": 100_000, "limit_val_tokens": 20_000, "epochs": 2}
_BEST = ("awd-lstm", "modern-transformer")


@dataclass
class Options:
    """What the command line says; `limits` override the presets' values. `runs` are those done, by their test loss."""

    volume: Volume
    device: str
    limits: dict[str, Any]
    epochs: int | None
    seed: int
    runs: dict[str, float]

    def job(self, preset: str, **changes: Any) -> LanguageModelJob:
        """Return the job of a preset."""
        basis = {"dataset": "d", "model_name": "m", "seed": self.seed, "device": self.device}
        return LanguageModelJob.model_validate({**basis, **load_preset(preset), **changes, **self.limits})


@dataclass(frozen=True)
class Never:
    """Nobody asks for the end."""

    is_set: bool = False
    is_final: bool = False


def main() -> None:
    """Prepare the data, and print each row of the table when it is there."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        volume = Volume(Path(folder) / "home")
        prepare(volume, arguments.source, Path(folder))
        limits = {**_SMOKE, **_SMALL} if arguments.smoke else {}
        epochs = 2 if arguments.smoke else arguments.epochs
        options = Options(volume, arguments.device, limits, epochs, arguments.seed, {})
        print_header(resolve_device(arguments.device), arguments.smoke)
        for name in arguments.only.split(","):
            for figure in PARTS[name](options):
                print_figure(figure, arguments.smoke)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_language_models", description=__doc__)
    parser.add_argument("--source", type=Path, default=os.environ.get("TANDEM_WIKITEXT"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=int, help="of the best presets; their own if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--smoke", action="store_true", help="few words, on any device: shows that it runs")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.only.split(",")) - set(PARTS)):
        parser.error(f"--only: there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not arguments.smoke and arguments.source is None:
        parser.error("--source (or TANDEM_WIKITEXT) must name a folder with train.txt …; --smoke needs none")
    if not arguments.smoke and resolve_device(arguments.device).type != "cuda":
        parser.error("there is no GPU here; --smoke runs on a CPU")
    return arguments


def prepare(volume: Volume, source: Path | None, folder: Path) -> None:
    """Prepare dataset `d`; without a source of made-up sentences."""
    if source is not None:
        prepare_wikitext(volume, source, "d")
        return
    chance = random.Random(0)
    lines = (" ".join(f"word{chance.randrange(50)}" for _ in range(12)) for _ in range(1000))
    (folder / "text.txt").write_text("\n".join(lines), "utf-8")
    prepare_text(volume, folder / "text.txt", "d")


def compat(options: Options) -> list[Figure]:
    """Train the report's Transformer in its set-up, and the example's LSTM for comparison."""
    seconds, metrics, rate = trained(options, "compat-transformer", options.job("compat-transformer"))
    ppl = metrics["test_ppl"]
    return [
        Figure("compat-transformer, 6 epochs: seconds", f"{seconds:.1f} ({rate})", "below 20", seconds < 20),
        Figure("compat-transformer, 6 epochs: test ppl", f"{ppl:.2f}", "below 192.94", ppl < 192.94),
        *best(options, "compat-lstm"),
    ]


def best(options: Options, preset: str) -> list[Figure]:
    """Train `preset` to its end."""
    changes = {"epochs": options.epochs} if options.epochs and preset in _BEST else {}
    seconds, metrics, rate = trained(options, preset, options.job(preset, **changes))
    ppl, claim = metrics["test_ppl"], "below 80 within 900 s" if preset in _BEST else ""
    reached = f"{ppl:.2f} (valid {metrics['val_ppl']:.2f}) in {seconds:.0f} s, {rate}"
    return [Figure(f"{preset}: test ppl", reached, claim, ppl < 80 and seconds < 900 if claim else None)]


def trained(options: Options, run_id: str, spec: LanguageModelJob) -> tuple[float, dict[str, float], str]:
    """Train as the training process does, checkpoints included; return seconds, metrics and the speed in words."""
    run = options.volume.run(run_id)
    run.mkdir(parents=True, exist_ok=True)
    (run / SPEC_FILE).write_text(spec.model_dump_json())
    events = io.StringIO()
    began = time.perf_counter()
    status = run_attempt(run, 1, events, Never())
    seconds = time.perf_counter() - began
    if status["outcome"] != "succeeded":
        raise SystemExit(f"{run_id}: {status['message']}")
    metrics = status["metrics"]
    assert isinstance(metrics, dict)
    options.runs[run_id] = metrics["test_loss"]
    rates = [each["rate"] for each in map(json.loads, events.getvalue().splitlines()) if each.get("rate")]
    return seconds, metrics, f"{rates[-1]:,.0f} words/s" if rates else "too short to measure its speed"


def modes(options: Options) -> list[Figure]:
    """Evaluate the best run so far with a cache and dynamically."""
    if not options.runs:
        return [Figure("cache and dynamic evaluation", "left out: no run is there; add a part that trains")]
    run_id = min(options.runs, key=lambda name: options.runs[name])
    figures = []
    for mode in ("cache", "dynamic"):
        run = options.volume.run(f"{run_id}-{mode}")
        run.mkdir(parents=True)
        basis = {"kind": "evaluate_language_model", "dataset": "d", "device": options.device}
        (run / SPEC_FILE).write_text(json.dumps({**basis, "model": f"run:{run_id}", "split": "test", "mode": mode}))
        status = run_attempt(run, 1, io.StringIO(), Never())
        metrics = status.get("metrics")
        reached = f"{metrics[f'{mode}_ppl']:.2f}" if isinstance(metrics, dict) else str(status["message"])
        figures.append(Figure(f"{run_id}: test ppl, {mode}", reached))
    return figures


def resume(options: Options) -> list[Figure]:
    """Interrupt runs at random steps, continue them in others, and compare the bytes of their weights."""
    return [resumed(options, preset) for preset in (*_BEST, "compat-lstm")]


def resumed(options: Options, preset: str) -> Figure:
    """Interrupt a run of `preset`, and continue it."""
    spec = options.job(preset, **_RESUME)

    def make() -> LanguageModelTraining:
        training = assemble(spec, options.volume, "bench").training
        assert isinstance(training, LanguageModelTraining)
        return training

    whole, first, second = make(), make(), make()
    finish(whole)
    stop_at = random.randrange(1, whole.step)
    next(report for report in first.fit() if isinstance(report, StepDone) and report.step == stop_at)
    weights, state = to_bytes(bare_state(first.served_network)), to_bytes(first.snapshot())
    load_weights(second.served_network, from_bytes(weights))
    second.restore(from_bytes(state))
    finish(second)
    same = to_bytes(bare_state(second.served_network)) == to_bytes(bare_state(whole.served_network))
    name = f"{preset}, interrupted at step {stop_at} of {whole.step}, continued"
    return Figure(name, "the same bytes" if same else "other bytes", "the same bytes", same)


def finish(training: LanguageModelTraining) -> dict[str, float]:
    """Train to the end; return the metrics of the last epoch."""
    epochs = [dict(report.metrics) for report in training.fit() if isinstance(report, EpochDone)]
    return epochs[-1]


PARTS: dict[str, Callable[[Options], list[Figure]]] = {
    "compat": compat,
    "resume": resume,
    "modern": lambda options: best(options, "modern-transformer"),
    "awd": lambda options: best(options, "awd-lstm"),
    "modes": modes,
}


if __name__ == "__main__":
    main()
