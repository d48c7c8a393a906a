"""Claims, for all of Tiny-ImageNet on one GPU (100,000 train and 10,000 val images, data preparation apart):

1. 20 epochs of the preset fast-64 take less than 60 s and reach an accuracy@1 of 55 % on val (the report: 1102 s, 28 to
   30 %);
2. the preset accurate-64 reaches 60 % within 5 minutes, in as many epochs as `--accurate-epochs` says;
3. the loop reaches 0.9 of the images/s of the bare step on a batch that is ready;
4. a run that is interrupted at a random step and continued ends in the bytes of one that was not;
and the seconds of one epoch of compat-224, the report's set-up.

One command: `python -m benchmarks.gpu_classification --source FOLDER`, with an unpacked Tiny-ImageNet (or
TANDEM_TINY_IMAGENET). Seconds count from the job spec to the end: opening the data, training, and evaluation after
each epoch; accuracies are those of the last epoch, without flip evaluation. It needs no broker. `--smoke` runs all of
it with few images on any device.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, print_figure, print_header
from benchmarks.prepare import write_pictures
from services.trainer.assembly import assemble
from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.reports import EpochDone, StepDone
from services.trainer.speed import measure
from tandem.checkpoints.tensors import from_bytes, to_bytes
from tandem.data.prepare import prepare_image_folder, prepare_tiny_imagenet
from tandem.jobs.presets import load_preset
from tandem.jobs.spec import ClassifierJob
from tandem.models.devices import resolve_device
from tandem.models.weights import bare_state, load_weights
from tandem.volume import Volume

_SMOKE = {"limit_train_images": 128, "limit_val_images": 32, "batch_size": 32}
_RESUME = {"limit_train_images": 8192, "limit_val_images": 512, "batch_size": 256}


@dataclass(frozen=True)
class Options:
    """What the command line says; `limits` override the presets' values."""

    volume: Volume
    device: str
    limits: dict[str, Any]
    fast_epochs: int
    accurate_epochs: int
    seed: int

    def job(self, preset: str, epochs: int, **changes: Any) -> ClassifierJob:
        """Return the job of a preset."""
        basis = {"dataset": "d", "model_name": "m", "seed": self.seed, "device": self.device}
        values = {**basis, **load_preset(preset), "epochs": epochs, **changes, **self.limits}
        return ClassifierJob.model_validate(values)

    def training(self, spec: ClassifierJob) -> ClassifierTraining:
        """Return the training of `spec`, as the training process puts it together."""
        training = assemble(spec, self.volume, "bench").training
        assert isinstance(training, ClassifierTraining)
        return training


def main() -> None:
    """Prepare the data, and print each row of the table when it is there."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        volume = Volume(Path(folder) / "home")
        prepare(volume, arguments.source, arguments.smoke, Path(folder))
        limits = _SMOKE if arguments.smoke else {}
        epochs, accurate_epochs = (2, 2) if arguments.smoke else (arguments.epochs, arguments.accurate_epochs)
        options = Options(volume, arguments.device, limits, epochs, accurate_epochs, arguments.seed)
        print_header(resolve_device(arguments.device), arguments.smoke)
        for name in arguments.only.split(","):
            for figure in PARTS[name](options):
                print_figure(figure, arguments.smoke)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_classification", description=__doc__)
    parser.add_argument("--source", type=Path, default=os.environ.get("TANDEM_TINY_IMAGENET"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=int, default=20, help="of fast-64")
    parser.add_argument("--accurate-epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--smoke", action="store_true", help="few images, on any device: shows that it runs")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.only.split(",")) - set(PARTS)):
        parser.error(f"--only: there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not arguments.smoke and arguments.source is None:
        parser.error("--source (or TANDEM_TINY_IMAGENET) must name an unpacked Tiny-ImageNet; --smoke needs none")
    if not arguments.smoke and resolve_device(arguments.device).type != "cuda":
        parser.error("there is no GPU here; --smoke runs on a CPU")
    return arguments


def prepare(volume: Volume, source: Path | None, smoke: bool, folder: Path) -> None:
    """Prepare dataset `d`."""
    began = time.perf_counter()
    if source is not None:
        dataset = prepare_tiny_imagenet(volume, source, "d", allow_missing=smoke)
        kind = "Tiny-ImageNet"
    else:
        dataset = prepare_image_folder(volume, write_pictures(folder / "source", 10, 20), "d")
        kind = "made-up pictures"
    counts = " and ".join(f"{count:,} {split}" for split, count in dataset.num_images.items())
    print(f"{kind}: {counts} images, prepared in {time.perf_counter() - began:.0f} s")


def fast(options: Options) -> list[Figure]:
    """Train fast-64."""
    return trained(options, "fast-64", options.fast_epochs, most_s=60, least_acc1=55)


def accurate(options: Options) -> list[Figure]:
    """Train accurate-64."""
    return trained(options, "accurate-64", options.accurate_epochs, most_s=300, least_acc1=60)


def trained(options: Options, preset: str, epochs: int, most_s: float, least_acc1: float) -> list[Figure]:
    """Train `preset` to its end; return its seconds and its accuracies."""
    began = time.perf_counter()
    training = options.training(options.job(preset, epochs))
    metrics = finish(training)
    seconds = time.perf_counter() - began
    name, acc1 = f"{preset}, {epochs} epochs", metrics["val_acc1"]
    reached = f"{acc1:.2f} % (best {metrics['val_best_acc1']:.2f}; acc@5 {metrics['val_acc5']:.2f})"
    return [
        Figure(f"{name}: seconds", f"{seconds:.1f}", f"below {most_s:.0f}", seconds < most_s),
        Figure(f"{name}: val acc@1", reached, f"{least_acc1:.0f} % or more", acc1 >= least_acc1),
    ]


def finish(training: ClassifierTraining) -> dict[str, float]:
    """Train to the end; return the metrics of the last epoch."""
    metrics: dict[str, float] = {}
    for report in training.fit():
        if isinstance(report, EpochDone):
            metrics = dict(report.metrics)
    return metrics


def speed(options: Options) -> list[Figure]:
    """Measure the loop in turns with its bare step, at the full image size."""
    row = measure(options.job("fast-64", 1, start_size=None, limit_val_images=64), options.volume, "gpu")
    shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in row.shares.items())
    return [
        Figure("fast-64 at 64 px: images/s", f"{row.images_per_s:,.0f}; bare step {row.bare_images_per_s:,.0f}"),
        Figure(f"loop / bare step (n = {row.num_turns})", f"{row.ratio:.3f}", "0.9 or more", row.ratio >= 0.9),
        Figure(f"where a step goes (n = {row.num_timed})", shares),
    ]


def resume(options: Options) -> list[Figure]:
    """Interrupt a run at a random step, continue it in another, and compare the bytes of their weights."""
    spec = options.job("fast-64", 3, **_RESUME)
    whole = options.training(spec)
    finish(whole)
    stop_at = random.randrange(1, whole.step)
    first = options.training(spec)
    next(report for report in first.fit() if isinstance(report, StepDone) and report.step == stop_at)
    weights, state = to_bytes(bare_state(first.served_network)), to_bytes(first.snapshot())
    second = options.training(spec)
    load_weights(second.served_network, from_bytes(weights))
    second.restore(from_bytes(state))
    finish(second)
    same = to_bytes(bare_state(second.served_network)) == to_bytes(bare_state(whole.served_network))
    name = f"interrupted at step {stop_at} of {whole.step}, continued"
    return [Figure(name, "the same bytes" if same else "other bytes", "the same bytes", same)]


def compat(options: Options) -> list[Figure]:
    """Train one epoch of compat-224."""
    began = time.perf_counter()
    metrics = finish(options.training(options.job("compat-224", 1)))
    reached = f"{time.perf_counter() - began:.1f} (val acc@1 {metrics['val_acc1']:.2f} %)"
    return [Figure("compat-224, 1 epoch: seconds", reached)]


PARTS: dict[str, Callable[[Options], list[Figure]]] = {
    "speed": speed,
    "resume": resume,
    "fast": fast,
    "compat": compat,
    "accurate": accurate,
}


if __name__ == "__main__":
    main()
