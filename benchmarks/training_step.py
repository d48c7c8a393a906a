"""Claim: a training loop takes at most 1/0.95 of the time of the bare step on ready tensors, for images and for words.

The bare step is forward, loss, backward, clip (words) and update on one batch that is at hand, with the same network,
optimizer, threads and memory format. Loop and bare step take turns, so that both see the same machine.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.reports import StepDone, Training
from tandem.checkpoints.card import Preprocessing
from tandem.data.splits import PackedSplit
from tandem.jobs.spec import ClassifierJob, LanguageModelJob
from tandem.models.classifiers import build_classifier
from tandem.models.language_models import LanguageModelShape, ModelState, build_language_model, detach

ROUNDS = 7
STEPS = {"resnet18 64 px, batch 64": 6, "LSTM 200, vocabulary 33,278": 20, "Transformer 200, vocabulary 33,278": 20}
VOCABULARY = 33_278


def main() -> None:
    """Print the median step of loop and bare step, and the median of their ratios round by round."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| network | loop ms | bare ms | bare / loop | n = {ROUNDS} rounds |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, tuple[Training, Callable[[], None]]] = {
            "resnet18 64 px, batch 64": classifier(Path(folder)),
            "LSTM 200, vocabulary 33,278": language_model("LSTM"),
            "Transformer 200, vocabulary 33,278": language_model("Transformer"),
        }
        for name, (training, bare) in cases.items():
            loops, bares = rounds(training, bare, STEPS[name])
            ratio = statistics.median(b / a for a, b in zip(loops, bares, strict=True))
            print(f"| {name} | {statistics.median(loops):.1f} | {statistics.median(bares):.1f} | {ratio:.3f} | |")


def rounds(training: Training, bare: Callable[[], None], steps: int) -> tuple[list[float], list[float]]:
    """Return milliseconds a step of the loop and of the bare step, a pair for each round after the first."""
    reports = (report for report in training.fit() if isinstance(report, StepDone))
    loops, bares = [], []
    for _ in range(ROUNDS + 1):
        loops.append(milliseconds(lambda: next(reports), steps))
        bares.append(milliseconds(bare, steps))
    return loops[1:], bares[1:]


def milliseconds(step: Callable[[], object], count: int) -> float:
    """Return the mean time of `count` steps."""
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count * 1000


def classifier(folder: Path) -> tuple[ClassifierTraining, Callable[[], None]]:
    """Return the loop over mapped images with crop and flip, and its bare step."""
    count, size = 20_000, 64
    pixels = np.lib.format.open_memmap(folder / "train.npy", mode="w+", dtype=np.uint8, shape=(count, 3, size, size))
    pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    preprocessing = Preprocessing(resize=size, image_size=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    labels = torch.arange(count) % 200
    split = PackedSplit(pixels, torch.arange(count), labels, [str(row) for row in range(count)], preprocessing)
    spec = ClassifierJob(dataset="d", model_name="m", arch="resnet18", batch_size=64)
    training = ClassifierTraining(
        spec, build_classifier("resnet18", 200, size), split, split, preprocessing, torch.device("cpu")
    )
    images = torch.randn(64, 3, size, size).contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        loss = F.cross_entropy(training.network(images), labels[:64])
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        training.optimizer.step()

    return training, bare


def language_model(model: str) -> tuple[LanguageModelTraining, Callable[[], None]]:
    """Return the loop over a text of random words, and its bare step; bptt 35, batch 20."""
    spec = LanguageModelJob.model_validate({"dataset": "d", "model_name": "m", "model": model})
    shape = LanguageModelShape(spec.model, VOCABULARY, 200, 200, 2, 2, 0.2, False, 140)
    text = torch.randint(VOCABULARY, (400_000,))
    training = LanguageModelTraining(spec, build_language_model(shape), text, text[:1000], torch.device("cpu"))
    inputs, targets = text[:700].view(20, 35), text[1:701].view(20, 35)
    state: ModelState | None = None

    def bare() -> None:
        nonlocal state
        logits, after = training.network(inputs, state)
        state = detach(after)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(training.network.parameters(), spec.clip_norm)
        training.optimizer.step()

    return training, bare


if __name__ == "__main__":
    main()
