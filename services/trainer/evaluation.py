"""The evaluation job, in the training process: a checkpoint over a split, its predictions file and its metrics.

It leaves in the run directory `predictions.jsonl` (`tandem.comparison.predictions`) and `evaluation.json`:

    {"model", "dataset", "split", "num_images", "precision", "acc1", "acc5", "loss", "ece", "flip": {"acc1", …} | null,
     "per_class": [{"id", "words", "num_images", "acc1"}…], "reliability": [{"lower", "upper", "num_images", …}…]}

acc1 and acc5 are percentages, loss is in nats, ece (the expected calibration error) is a share, 0 to 1. `flip` is of
the mean over each image and its mirror image. `per_class` has the classes of which the split holds images.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from services.trainer.engine.evaluation import TOP_K, Evaluator, Predictions
from tandem.checkpoints.card import ClassifierCard
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.tensors import load_checkpoint
from tandem.comparison.calibration import expected_calibration_error, reliability_table
from tandem.comparison.classification import Floats, class_accuracy, confusion_matrix
from tandem.comparison.predictions import (
    EVALUATION_FILE,
    PREDICTIONS_FILE,
    Header,
    Prediction,
    ScoredId,
    write_predictions,
)
from tandem.data.splits import ImageSplit, open_split
from tandem.errors import InvalidJob, NonFiniteLoss
from tandem.jobs.checks import image_split, model_classes
from tandem.jobs.spec import EvaluationJob
from tandem.models.devices import resolve_device, resolve_precision
from tandem.volume import Volume, replace_json, volume_errors

log = logging.getLogger("tandem.run")

_PROGRESS_INTERVAL_S = 0.5


def evaluate(
    spec: EvaluationJob,
    run: Path,
    volume: Volume,
    report: Callable[..., None],
    stop: Callable[[], bool],
    fence: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, float] | None:
    """Evaluate, write both files into the run directory, and return the flat metrics; None if it was stopped.

    The files are written under `fence()`, which raises where the attempt may write no more.

    `report("progress", **facts)` is called at most twice a second. Raises TandemError where model and data don't fit.
    """
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    subject = _open_subject(spec, volume)
    meter = _Meter(report, spec, len(subject.split.labels))
    plain = _predict(subject, spec, meter, stop, mirror=False)
    if plain is None:
        return None
    mirrored = _predict(subject, spec, meter, stop, mirror=True) if spec.flip else None
    if spec.flip and mirrored is None:
        return None
    document = _document(subject, plain, mirrored)
    with volume_errors(run / EVALUATION_FILE), fence():
        write_predictions(run / PREDICTIONS_FILE, subject.header, _rows(subject, plain, spec.top_k))
        replace_json(run / EVALUATION_FILE, document)
    return flat_metrics(document)


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, and on what; the labels of the split are the model's class indices."""

    header: Header
    network: nn.Module
    evaluator: Evaluator
    split: ImageSplit


def _open_subject(spec: EvaluationJob, volume: Volume) -> _Subject:
    located = Registry(volume).resolve(spec.model)
    checkpoint = load_checkpoint(located.checkpoint, located.digest)
    card = checkpoint.card
    if not isinstance(card, ClassifierCard):
        raise InvalidJob(f"{located.label} is a language model; only classifiers are evaluated on images")
    dataset = image_split(spec.dataset, spec.split, volume)
    split = open_split(volume.dataset(spec.dataset), dataset, spec.split, card.preprocessing, spec.limit_images)
    # The two may order the same classes differently.
    split.labels = torch.tensor(model_classes(card, dataset, located.label))[split.labels]
    device = resolve_device(spec.device)
    precision = resolve_precision(spec.precision, device)
    header = Header(
        model=located.label,
        run_id=card.run_id,
        step=card.step,
        architecture=card.architecture,
        precision=precision,
        dataset=spec.dataset,
        dataset_fingerprint=dataset.fingerprint,
        split=spec.split,
        num_images=len(split.labels),
        classes=card.classes,
    )
    network = checkpoint.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _Subject(header, network, Evaluator(card.preprocessing, device, precision, spec.batch_size), split)


def _predict(
    subject: _Subject, spec: EvaluationJob, meter: "_Meter", stop: Callable[[], bool], mirror: bool
) -> Predictions | None:
    evaluation = subject.evaluator.predict(subject.network, subject.split, max(TOP_K, spec.top_k), mirror)
    for _ in evaluation:
        if stop():
            return None
        meter.batch_done()
    _check_finite(evaluation.predictions, subject)
    return evaluation.predictions


def _check_finite(predictions: Predictions, subject: _Subject) -> None:
    broken = (~predictions.losses.isfinite()).nonzero()
    if len(broken):
        raise NonFiniteLoss(
            f"{subject.header.model} gives {subject.split.files[int(broken[0])]} a loss that is no number "
            f"({len(broken)} of {len(predictions.losses)} images); its weights have diverged"
        )


class _Meter:
    """Counts batches, and reports how far the evaluation is: step and num_steps are batches of all its passes."""

    def __init__(self, report: Callable[..., None], spec: EvaluationJob, num_images: int) -> None:
        self._report = report
        self._num_images, self._batch_size = num_images, spec.batch_size
        self._batches_a_pass = -(-num_images // spec.batch_size)
        self._num_passes = 2 if spec.flip else 1
        self._num_batches = 0
        self._began = time.monotonic()
        self._said_at = self._began - _PROGRESS_INTERVAL_S

    def batch_done(self) -> None:
        self._num_batches += 1
        now, total = time.monotonic(), self._batches_a_pass * self._num_passes
        if now - self._said_at < _PROGRESS_INTERVAL_S and self._num_batches < total:
            return
        self._said_at = now
        passes, batches = divmod(self._num_batches, self._batches_a_pass)
        done = passes * self._num_images + batches * self._batch_size
        rate = done / max(now - self._began, 1e-9)
        left = (self._num_passes * self._num_images - done) / rate
        self._report("progress", step=self._num_batches, num_steps=total, rate=rate, time_left_s=left, metrics={})


def _rows(subject: _Subject, predictions: Predictions, top_k: int) -> Iterator[Prediction]:
    ids = [each.id for each in subject.header.classes]
    classes = predictions.top_classes[:, :top_k].tolist()
    probabilities = predictions.top_probabilities[:, :top_k].tolist()
    for file, label, best, scores in zip(
        subject.split.files, predictions.labels.tolist(), classes, probabilities, strict=True
    ):
        top = tuple(ScoredId(id=ids[each], probability=_short(score)) for each, score in zip(best, scores, strict=True))
        yield Prediction(file=file, label=ids[label], top_k=top)


def _short(probability: float) -> float:
    """Return a float32 probability as the number of seven digits that stands for it."""
    return float(f"{min(probability, 1.0):.7g}")


def _document(subject: _Subject, plain: Predictions, mirrored: Predictions | None) -> dict[str, Any]:
    header = subject.header
    confidences, right = _confidences(plain)
    return {
        "model": header.model,
        "dataset": header.dataset,
        "split": header.split,
        "num_images": header.num_images,
        "precision": header.precision,
        **_metrics(plain),
        "flip": None if mirrored is None else _metrics(mirrored),
        "per_class": _per_class(header, plain),
        "reliability": [each._asdict() for each in reliability_table(confidences, right)],
    }


def _metrics(predictions: Predictions) -> dict[str, float]:
    return {**predictions.metrics(""), "ece": expected_calibration_error(*_confidences(predictions))}


def _confidences(predictions: Predictions) -> tuple[Floats, "np.ndarray[Any, np.dtype[np.bool_]]"]:
    # A softmax in float32 may come out a rounding above 1.
    confidences = predictions.top_probabilities[:, 0].double().clamp(max=1.0).numpy()
    return confidences, (predictions.top_classes[:, 0] == predictions.labels).numpy()


def _per_class(header: Header, predictions: Predictions) -> list[dict[str, Any]]:
    named = predictions.top_classes[:, 0].numpy()
    confusion = confusion_matrix(predictions.labels.numpy(), named, len(header.classes))
    num_images, percent = class_accuracy(confusion)
    return [
        {"id": each.id, "words": each.words, "num_images": int(count), "acc1": float(share)}
        for each, count, share in zip(header.classes, num_images, percent, strict=True)
        if count
    ]


def flat_metrics(document: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of `evaluation.json` as a run's record keeps them: acc1, acc5, loss, ece, and flip_acc1 …"""
    flip = document["flip"] or {}
    plain = {name: document[name] for name in ("acc1", "acc5", "loss", "ece")}
    return {**plain, **{f"flip_{name}": value for name, value in flip.items()}}
