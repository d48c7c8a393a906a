"""Which of two classifiers is better, by how much, and how sure that is, from what both say of the same images."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tandem.comparison.agreement import cohens_kappa, divergences
from tandem.comparison.by_class import class_differences, tabulate_flags
from tandem.comparison.calibration import expected_calibration_error
from tandem.comparison.classification import Indices
from tandem.comparison.evidence import Evidence, Labelled, Share, Standing
from tandem.comparison.intervals import difference_interval, share_interval
from tandem.comparison.matching import MatchedClasses
from tandem.comparison.results import PairResult, ScoredClass

TOP_K = 5
# Batches that are kept as they came: one image in arrays of its own takes 1.2 kB.
_LOOSE = 512

Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class Predictions:
    """What a model predicts of N images: `probabilities` (N, C), and the five likeliest of its classes or more, best
    first, `ranked` (N, K). Which of equally likely ones comes first is the model's affair."""

    probabilities: Floats
    ranked: Indices


@dataclass(frozen=True)
class Answers:
    """What one model says of N images: the class it names, whether the label is among its five likeliest, and the
    probability of the class it names."""

    named: Indices
    in_top_5: Flags
    confidence: Floats


@dataclass(frozen=True)
class Columns:
    """N images, a row each: `labels` (N,), -1 where unknown, what a and b say, and how far apart they are, in bits."""

    labels: Indices
    a: Answers
    b: Answers
    divergence: Floats


class Recorder:
    """Takes what both models say, batch by batch, and keeps 38 bytes an image."""

    def __init__(self, classes: MatchedClasses) -> None:
        self.classes = classes
        # Of many batches each, and those that came since.
        self._joined: list[Columns] = []
        self._batches: list[Columns] = []

    def add(self, a: Predictions, b: Predictions, labels: Indices) -> Columns:
        """Record N images with `labels` (N,), places among all classes, -1 where unknown; return them as columns."""
        places_a, places_b = self.classes.place_a, self.classes.place_b
        apart = divergences(
            self.classes.spread(a.probabilities, places_a), self.classes.spread(b.probabilities, places_b)
        )
        answers = _answers(a, places_a, labels), _answers(b, places_b, labels)
        columns = Columns(labels, *answers, apart.astype(np.float32))
        self._batches.append(columns)
        if len(self._batches) == _LOOSE:
            self._joined.append(_join(self._batches))
            self._batches.clear()
        return columns

    def evidence(self) -> Evidence:
        """Return the evidence of all images so far."""
        classes = self.classes
        return replace(
            weigh(self.columns(), [each.id for each in classes.all]),
            only_in_a=tuple(each.id for each in classes.only_in_a),
            only_in_b=tuple(each.id for each in classes.only_in_b),
        )

    def columns(self) -> Columns:
        """Return all images so far."""
        return _join([*self._joined, *self._batches])


def _join(batches: Sequence[Columns]) -> Columns:
    def joined(part: Callable[[Columns], NDArray[T]], kind: type) -> NDArray[T]:  # type: ignore[type-var]
        return np.concatenate([part(each) for each in batches]) if batches else np.zeros(0, kind)

    def answers(side: Callable[[Columns], Answers]) -> Answers:
        return Answers(
            joined(lambda each: side(each).named, np.int64),
            joined(lambda each: side(each).in_top_5, np.bool_),
            joined(lambda each: side(each).confidence, np.float32),
        )

    return Columns(
        joined(lambda each: each.labels, np.int64),
        answers(lambda each: each.a),
        answers(lambda each: each.b),
        joined(lambda each: each.divergence, np.float32),
    )


def weigh(columns: Columns, ids: Sequence[str]) -> Evidence:
    """Return the evidence of images of classes with these `ids`; one without a label counts for agreement alone."""
    differ = columns.a.named != columns.b.named
    kappa = cohens_kappa(columns.a.named, columns.b.named)
    return Evidence(
        num_images=len(differ),
        num_disagreements=int(differ.sum()),
        kappa=None if math.isnan(kappa) else kappa,
        divergence=float(columns.divergence.mean(dtype=np.float64)) if len(differ) else 0.0,
        labelled=_labelled(columns, ids),
    )


def weigh_pairs(pairs: Sequence[PairResult], labels: Iterable[str], has_divergence: bool = True) -> Evidence:
    """Return the evidence of images, from their lists of five classes or of all there are.

    `labels` are the ids of the classes that a model knows, as far as images have them.
    """
    found = [pair for pair in pairs if not pair.error]
    known = set(labels)
    ids = [*dict.fromkeys([*sorted(known), *(each.id for pair in found for each in (*pair.a, *pair.b))])]
    places = {each: place for place, each in enumerate(ids)}
    truth = np.array([places[pair.label] if pair.label in known else -1 for pair in found], np.int64)
    columns = Columns(
        truth,
        _listed([pair.a for pair in found], places, truth),
        _listed([pair.b for pair in found], places, truth),
        np.array([pair.divergence for pair in found], np.float32),
    )
    evidence = weigh(columns, ids)
    return evidence if has_divergence else replace(evidence, divergence=None)


def _listed(lists: Sequence[Sequence[ScoredClass]], known: Mapping[str, int], labels: Indices) -> Answers:
    places = [[known[each.id] for each in scored[:TOP_K]] for scored in lists]
    return Answers(
        np.array([row[0] for row in places], np.int64),
        np.array([label in row for label, row in zip(labels.tolist(), places, strict=True)], np.bool_),
        np.array([scored[0].probability for scored in lists], np.float32),
    )


def _labelled(columns: Columns, ids: Sequence[str]) -> Labelled | None:
    known = columns.labels >= 0
    if not known.any():
        return None
    labels = columns.labels[known]
    right_a, right_b = columns.a.named[known] == labels, columns.b.named[known] == labels
    table = tabulate_flags(right_a, right_b)
    return Labelled(
        table,
        _standing(columns.a, known, right_a),
        _standing(columns.b, known, right_b),
        difference_interval(table),
        class_differences(ids, labels, right_a, right_b),
    )


def _standing(answers: Answers, known: Flags, right: Flags) -> Standing:
    calibration = expected_calibration_error(answers.confidence[known], right)
    return Standing(_share(right), _share(answers.in_top_5[known]), calibration)


def _share(right: Flags) -> Share:
    count = int(right.sum())
    return Share(count / len(right), share_interval(count, len(right)))


def _answers(predictions: Predictions, places: Indices, labels: Indices) -> Answers:
    ranked = places[predictions.ranked[:, :TOP_K]]
    confidence = np.take_along_axis(predictions.probabilities, predictions.ranked[:, :1], axis=1)[:, 0]
    # Rounding may leave a sum of probabilities a little above 1.
    return Answers(ranked[:, 0], (ranked == labels[:, None]).any(axis=1), np.clip(confidence, 0, 1).astype(np.float32))
