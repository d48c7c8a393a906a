"""Claims, for ResNet-18 at 64 px, batch 64, 200 classes, on a CPU:

1. a training epoch goes at 2 times the images/s of the reference script's way or more, with `--precision auto` where
   the CPU has bfloat16 instructions;
2. the loop reaches 0.95 of the bare step (forward, backward and update on one batch that is ready) at its precision;
3. the packed file is mapped: a process that trains on all of Tiny-ImageNet (1.23 GB) has at its peak less than 2 GiB
   more than one that trains on few images;
4. one epoch of all of Tiny-ImageNet takes less than the report's 1338 s, data preparation apart.

The reference's way: torchvision's ImageFolder, PIL, RandomResizedCrop(64), flip, ToTensor, Normalize, DataLoader with 4
workers, float32, `.item()` at each step. It, the loop and the bare steps take turns; ratios are taken turn by turn.

TANDEM_TINY_IMAGENET names an unpacked Tiny-ImageNet; without it 20,000 made-up JPEGs of 64×64 are used.
TANDEM_BENCH_ROUNDS (3), TANDEM_BENCH_STEPS (40) and TANDEM_BENCH_WARM_UP (5) shorten a look. TANDEM_FULL_EPOCH=1 runs
claim 4, which takes minutes and needs the real images.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision import transforms

from benchmarks.plain import PlainTraining, train_loader
from benchmarks.prepare import write_pictures
from services.trainer.assembly import assemble
from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.reports import EpochDone, Report, StepDone
from services.trainer.speed import BareStep
from tandem.checkpoints.card import Preprocessing
from tandem.data.prepare import prepare_image_folder, prepare_tiny_imagenet
from tandem.data.splits import PackedSplit
from tandem.jobs.spec import ClassifierJob
from tandem.volume import Volume

ROUNDS = int(os.environ.get("TANDEM_BENCH_ROUNDS", "3"))
STEPS = int(os.environ.get("TANDEM_BENCH_STEPS", "40"))
WARM_UP = int(os.environ.get("TANDEM_BENCH_WARM_UP", "5"))
SIDE, BATCH_SIZE, NUM_CLASSES, WORKERS = 64, 64, 200, 4
REPORT_S = 1338.0
# Of Tiny-ImageNet.
ALL_IMAGES, FEW_IMAGES = 100_000, 2_000

# Does a number of warm-up steps, then STEPS more; returns images/s of the latter.
Contender = Callable[[], float]


def main() -> None:
    """Print the tables."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        tree, volume = prepare(Path(folder))
        print_speeds(tree, volume)
        if os.environ.get("TANDEM_FULL_EPOCH") == "1":
            print_epoch(volume)
    with tempfile.TemporaryDirectory() as folder:
        print_memory(Path(folder))


def prepare(folder: Path) -> tuple[Path, Volume]:
    """Return class folders of images, and a volume where they are dataset `d`."""
    volume = Volume(folder / "home")
    if given := os.environ.get("TANDEM_TINY_IMAGENET"):
        dataset = prepare_tiny_imagenet(volume, Path(given), "d", allow_missing=True)
        print(f"real images: {dataset.num_images['train']:,} of Tiny-ImageNet\n")
        return Path(given) / "train", volume
    tree = write_pictures(folder / "source", NUM_CLASSES, 100)
    dataset = prepare_image_folder(volume, tree, "d")
    print(f"made-up images: {dataset.num_images['train']:,}\n")
    return tree, volume


def job(**changes: Any) -> ClassifierJob:
    """Return the reference's job: its random crop and flip, and what `changes`."""
    values = {
        "arch": "resnet18",
        "image_size": SIDE,
        "batch_size": BATCH_SIZE,
        "crop": "resized",
        "min_crop_area": 0.08,
    }
    basis = {"dataset": "d", "model_name": "m", "device": "cpu", "epochs": 100, "limit_val_images": 64}
    return ClassifierJob.model_validate({**basis, **values, **changes})


def training_of(spec: ClassifierJob, volume: Volume) -> ClassifierTraining:
    """Return the training of `spec`, as the training process puts it together."""
    training = assemble(spec, volume, "bench").training
    assert isinstance(training, ClassifierTraining)
    return training


def print_speeds(tree: Path, volume: Volume) -> None:
    """Print images/s of all ways, and the ratios round by round."""
    contenders: dict[str, Contender] = {"reference": reference(tree)}
    pairs = [("reference", "auto"), ("reference", "float32")]
    for precision in ("auto", "float32"):
        training = training_of(job(precision=precision), volume)
        contenders[precision] = loop(training)
        contenders[f"bare {precision}"] = bare(training)
        pairs.append((f"bare {precision}", precision))
        print(f"precision {precision} is {training.evaluator.precision}")
    rounds = [{name: run() for name, run in contenders.items()} for _ in range(ROUNDS)]
    print(f"\n| way | images/s | min | max | n = {ROUNDS} rounds of {STEPS} steps |\n|---|---|---|---|---|")
    for name in contenders:
        speeds = [each[name] for each in rounds]
        print(f"| {name} | {statistics.median(speeds):.0f} | {min(speeds):.0f} | {max(speeds):.0f} | |")
    print("\n| ratio | median | min | max |\n|---|---|---|---|")
    for below, above in pairs:
        ratios = [each[above] / each[below] for each in rounds]
        print(f"| {above} / {below} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")


def reference(tree: Path) -> Contender:
    """Return the reference's way, its loader started anew each time."""
    loader = train_loader(tree, [transforms.RandomResizedCrop(SIDE)], BATCH_SIZE, WORKERS)
    training = PlainTraining(NUM_CLASSES)

    def run() -> float:
        with closing(training.steps(loader)) as steps:  # type: ignore[type-var]
            consume(steps, WARM_UP)
            began = time.perf_counter()
            consume(steps, STEPS)
            return STEPS * BATCH_SIZE / (time.perf_counter() - began)

    return run


def consume(steps: Iterator[object], count: int) -> None:
    """Take `count` steps."""
    for _ in islice(steps, count):
        pass


def loop(training: ClassifierTraining) -> Contender:
    """Return Tandem's way: the training loop, going on where it stopped."""
    reports = training.fit()

    def run() -> float:
        begin_epoch(training, reports)
        consume(reports, WARM_UP)
        began = time.perf_counter()
        images = sum(report.num_examples for report in islice(reports, STEPS) if isinstance(report, StepDone))
        return images / (time.perf_counter() - began)

    return run


def begin_epoch(training: ClassifierTraining, reports: Iterator[Report]) -> None:
    """Go on to the next epoch where too few steps are left in this one: no evaluation is to be timed."""
    left = training.steps_per_epoch - training.step % training.steps_per_epoch
    if left < WARM_UP + STEPS:
        next(report for report in reports if isinstance(report, EpochDone))


def bare(training: ClassifierTraining) -> Contender:
    """Return the bare step of `training`."""
    step = BareStep(training, SIDE)

    def run() -> float:
        step.seconds(WARM_UP)
        return STEPS * step.num_images / step.seconds(STEPS)

    return run


def print_epoch(volume: Volume) -> None:
    """Train one epoch of everything, evaluation on all of val included, and print its seconds."""
    training = training_of(job(epochs=1, precision="auto", limit_val_images=None), volume)
    began = time.perf_counter()
    done = next(report for report in training.fit() if isinstance(report, EpochDone))
    seconds = time.perf_counter() - began
    count = training.step * BATCH_SIZE
    print(f"\none epoch of {count:,} images, with evaluation: {seconds:.0f} s (the report: {REPORT_S:.0f} s), n = 1")
    print(f"val accuracy@1 {done.metrics['val_acc1']:.1f} %")


def print_memory(folder: Path) -> None:
    """Print the peak of resident memory of processes that train two epochs on few images, and on all."""
    peaks = {}
    for count in (FEW_IMAGES, ALL_IMAGES):
        write_pixels(folder / f"{count}.npy", count)
        peaks[count] = peak_of_process(folder / f"{count}.npy")
    print("\n| train images | peak resident MiB |\n|---|---|")
    for count, peak in peaks.items():
        print(f"| {count:,} | {peak / 2**20:,.0f} |")
    more = (peaks[ALL_IMAGES] - peaks[FEW_IMAGES]) / 2**30
    print(f"\n{more:.2f} GiB more for {ALL_IMAGES:,} images (claim: below 2), two epochs each, n = 1")


def write_pixels(path: Path, count: int) -> None:
    """Write a packed file of random pixels."""
    generator = np.random.default_rng(0)
    pixels = np.lib.format.open_memmap(path, "w+", np.dtype(np.uint8), (count, 3, SIDE, SIDE))
    for row in range(0, count, 1000):
        pixels[row : row + 1000] = generator.integers(0, 256, pixels[row : row + 1000].shape, dtype=np.uint8)
    pixels.flush()


def peak_of_process(path: Path) -> int:
    """Return the peak of resident bytes of a new process that trains two epochs on the mapped file `path`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=train_on, args=(path, there))
    process.start()
    there.close()
    peak: int = here.recv()
    process.join()
    return peak


def train_on(path: Path, answer: "Connection[Any, Any]") -> None:
    """Train a tiny network on every image of the packed file `path`, twice; send the peak of resident bytes."""
    preprocessing = Preprocessing(resize=SIDE, image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    pixels = np.load(path, mmap_mode="r")
    rows = torch.arange(len(pixels))
    train = PackedSplit(pixels, rows, rows % NUM_CLASSES, [""] * len(rows), preprocessing)
    val = PackedSplit(pixels[:BATCH_SIZE], rows[:BATCH_SIZE], rows[:BATCH_SIZE], [""] * BATCH_SIZE, preprocessing)
    network = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(48, NUM_CLASSES))
    training = ClassifierTraining(job(epochs=2), network, train, val, preprocessing, torch.device("cpu"))
    for _ in training.fit():
        pass
    lines = Path("/proc/self/status").read_text().splitlines()
    answer.send(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
