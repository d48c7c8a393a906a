"""Claim: the preset compat-224 reaches what the reference's loop reaches, within the noise between seeds.

The same loop written plainly (`benchmarks.plain`): ImageFolder, Resize(224), flip, ToTensor, Normalize, SGD (rate 0.1,
momentum 0.9, weight decay 1e-4 on everything), StepLR(30), float32, batch 64. Both train on the same part of
Tiny-ImageNet with several seeds; Welch's test says whether their means differ by more than chance. From the same
weights and in the same order of images they compute the same losses: tests/unit/test_compat.py.

TANDEM_TINY_IMAGENET names an unpacked Tiny-ImageNet; without it made-up images are used, of a colour for each class.
TANDEM_COMPAT_CLASSES (10), _TRAIN (60 images a class), _VAL (20), _EPOCHS (3) and _SEEDS (3) set the size.
"""

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import ttest_ind
from torchvision import transforms

from benchmarks.plain import PlainTraining, train_loader, val_loader
from services.trainer.assembly import assemble
from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.reports import EpochDone
from tandem.data.prepare import prepare_image_folder
from tandem.jobs.presets import load_preset
from tandem.jobs.spec import ClassifierJob
from tandem.volume import Volume


def _size(name: str, default: int) -> int:
    return int(os.environ.get(f"TANDEM_COMPAT_{name}", default))


CLASSES, TRAIN, VAL = _size("CLASSES", 10), _size("TRAIN", 60), _size("VAL", 20)
EPOCHS, SEEDS = _size("EPOCHS", 3), _size("SEEDS", 3)
SIDE, BATCH_SIZE, WORKERS = 64, 64, 2
# The preset's 224; a smaller one, for both ways, is another network but the same recipe, and far quicker.
RESIZED = _size("SIDE", 224)
# Of Welch's test: below it the means would differ by more than chance.
LEAST_P = 0.05


@dataclass(frozen=True)
class Result:
    """How a run ended: mean train loss of its last epoch, and accuracy@1 on val in percent."""

    train_loss: float
    val_acc1: float
    seconds: float


def main() -> None:
    """Print both ways' results for each seed, and what a test says of their difference."""
    with tempfile.TemporaryDirectory() as folder:
        tree = write_part(Path(folder) / "part")
        volume = Volume(Path(folder) / "home")
        prepare_image_folder(volume, tree, "part")
        part = f"{CLASSES} classes of {TRAIN} train and {VAL} val images, {RESIZED} px, {EPOCHS} epochs"
        print(f"{part}; torch {torch.__version__}\n")
        print("| seed | way | train loss | val accuracy@1 | seconds |\n|---|---|---|---|---|")
        ways: dict[str, list[Result]] = {"plain": [], "compat-224": []}
        for seed in range(SEEDS):
            for name, results in ways.items():
                result = plain(tree, seed) if name == "plain" else preset(volume, seed)
                results.append(result)
                print(f"| {seed} | {name} | {result.train_loss:.3f} | {result.val_acc1:.1f} | {result.seconds:.0f} |")
    print_comparison(ways)


def print_comparison(ways: dict[str, list[Result]]) -> None:
    """Print means, spreads, and Welch's p of each metric."""
    print(f"\n| metric | way | mean | standard deviation | n = {SEEDS} seeds |\n|---|---|---|---|---|")
    verdicts = []
    for metric in ("train_loss", "val_acc1"):
        plain, preset = ([getattr(each, metric) for each in results] for results in ways.values())
        for name, values in zip(ways, (plain, preset), strict=True):
            print(f"| {metric} | {name} | {statistics.mean(values):.3f} | {statistics.stdev(values):.3f} | |")
        verdicts.append(f"{metric}: {compared(plain, preset)}")
    print("\n" + "\n".join(verdicts))


def compared(plain: list[float], preset: list[float]) -> str:
    """Say how far apart the means are, and whether that is more than chance (Welch's test)."""
    difference = statistics.mean(preset) - statistics.mean(plain)
    # Without any spread there is nothing to test against.
    spread = statistics.stdev(plain) + statistics.stdev(preset)
    p = float(ttest_ind(plain, preset, equal_var=False).pvalue) if spread else float(difference == 0)
    verdict = "within noise" if p >= LEAST_P else "beyond noise"
    return f"preset - plain = {difference:+.3f}, p = {p:.2f}, {verdict}"


def plain(tree: Path, seed: int) -> Result:
    """Train the reference's loop."""
    torch.manual_seed(seed)
    began, resize = time.perf_counter(), [transforms.Resize(RESIZED)]
    train = train_loader(tree / "train", resize, BATCH_SIZE, WORKERS)
    training = PlainTraining(CLASSES)
    for _ in range(EPOCHS):
        loss = training.epoch(train)
    accuracy = training.accuracy(val_loader(tree / "val", resize, BATCH_SIZE, WORKERS))
    return Result(loss, accuracy, time.perf_counter() - began)


def preset(volume: Volume, seed: int) -> Result:
    """Train the preset."""
    began = time.perf_counter()
    values = {
        **load_preset("compat-224"),
        "epochs": EPOCHS,
        "seed": seed,
        "device": "cpu",
        "image_size": RESIZED,
        "resize": RESIZED,
    }
    spec = ClassifierJob.model_validate({"dataset": "part", "model_name": "m", **values})
    training = assemble(spec, volume, "compat").training
    assert isinstance(training, ClassifierTraining)
    for report in training.fit():
        if isinstance(report, EpochDone):
            metrics = report.metrics
    return Result(metrics["train_loss"], metrics["val_acc1"], time.perf_counter() - began)


def write_part(folder: Path) -> Path:
    """Write class folders below train/ and val/, of real images where there are any."""
    if given := os.environ.get("TANDEM_TINY_IMAGENET"):
        print(f"real images, from {CLASSES} classes of Tiny-ImageNet")
        copy_part(Path(given), folder)
    else:
        print("made-up images")
        make_part(folder)
    return folder


def copy_part(source: Path, folder: Path) -> None:
    """Copy the first images of the first classes of an unpacked Tiny-ImageNet."""
    rows = [line.split("\t")[:2] for line in (source / "val" / "val_annotations.txt").read_text().splitlines()]
    for name in sorted(path.name for path in (source / "train").iterdir())[:CLASSES]:
        train = sorted((source / "train" / name / "images").glob("*.JPEG"))[:TRAIN]
        val = [source / "val" / "images" / file for file, label in rows if label == name][:VAL]
        for split, files in (("train", train), ("val", val)):
            (folder / split / name).mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder / split / name)


def make_part(folder: Path) -> None:
    """Write noisy pictures, a part of whose colour is that of their class."""
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        colour = generator.integers(0, 256, 3)
        for split, count in (("train", TRAIN), ("val", VAL)):
            (folder / split / f"class{label:02d}").mkdir(parents=True)
            for number in range(count):
                coarse = (generator.integers(0, 256, (8, 8, 3)) * 3 + colour) // 4
                picture = Image.fromarray(coarse.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                picture.save(folder / split / f"class{label:02d}" / f"{number:04d}.jpg", quality=90)


if __name__ == "__main__":
    main()
