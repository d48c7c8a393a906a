"""Which of two classifiers is better, by how much, and how sure that is, from what both say of the same images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tandem.comparison.agreement import cohens_kappa, divergences
from tandem.comparison.by_class import ClassDifference, class_differences, tabulate_flags
from tandem.comparison.calibration import expected_calibration_error
from tandem.comparison.classification import Indices
from tandem.comparison.intervals import Interval, difference_interval, share_interval
from tandem.comparison.matching import MatchedClasses
from tandem.comparison.paired import PairedTable

TOP_K = 5
ALPHA = 0.05

Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]
T = TypeVar("T")


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


@dataclass(frozen=True)
class Accuracy:
    """A share of the labelled images, 0 to 1, with its 95 % interval."""

    share: float
    interval: Interval

    @classmethod
    def of(cls, right: Flags) -> "Accuracy":
        """Count the flags (N,)."""
        count = int(right.sum())
        return cls(count / len(right), share_interval(count, len(right)))


@dataclass(frozen=True)
class Standing:
    """One model on the labelled images: accuracy@1 and @5, and its expected calibration error, 0 to 1."""

    top_1: Accuracy
    top_5: Accuracy
    calibration_error: float


@dataclass(frozen=True)
class Labelled:
    """What the labels say: the paired table and all that follows from it; `by_class` only of classes with images."""

    table: PairedTable
    a: Standing
    b: Standing
    interval: Interval
    by_class: tuple[ClassDifference, ...]

    @property
    def difference(self) -> float:
        """Accuracy b - accuracy a, within -1 and 1; `interval` is of it."""
        return self.table.accuracy_b - self.table.accuracy_a


@dataclass(frozen=True)
class Evidence:
    """Of all images: how far the models agree (kappa NaN where it says nothing), and how far apart they are on average,
    in bits; `labelled` is None without a label."""

    num_images: int
    num_disagreements: int
    kappa: float
    divergence: float
    labelled: Labelled | None


class Recorder:
    """Takes what both models say, batch by batch, and keeps some 50 bytes an image."""

    def __init__(self, classes: MatchedClasses) -> None:
        self.classes = classes
        self._batches: list[Columns] = []

    def add(self, a: Floats, b: Floats, labels: Indices) -> Columns:
        """Record probabilities (N, Ca) and (N, Cb) of N images with `labels` (N,), -1 where unknown; return them as
        columns."""
        spread, places_a, places_b = self.classes.spread, self.classes.place_a, self.classes.place_b
        of_a, of_b = spread(a, places_a), spread(b, places_b)
        columns = Columns(
            labels,
            _answers(of_a, places_a, labels),
            _answers(of_b, places_b, labels),
            divergences(of_a, of_b).astype(np.float32),
        )
        self._batches.append(columns)
        return columns

    def columns(self) -> Columns:
        """Return all images so far."""

        def joined(part: Callable[[Columns], NDArray[T]], kind: type) -> NDArray[T]:  # type: ignore[type-var]
            return np.concatenate([part(each) for each in self._batches]) if self._batches else np.zeros(0, kind)

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


def weigh(columns: Columns) -> Evidence:
    """Return the evidence of all images; one that no label says anything of counts for agreement alone."""
    differ = columns.a.named != columns.b.named
    return Evidence(
        num_images=len(differ),
        num_disagreements=int(differ.sum()),
        kappa=cohens_kappa(columns.a.named, columns.b.named),
        divergence=float(columns.divergence.mean()) if len(differ) else 0.0,
        labelled=_labelled(columns),
    )


def _labelled(columns: Columns) -> Labelled | None:
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
        class_differences(labels, right_a, right_b),
    )


def _standing(answers: Answers, known: Flags, right: Flags) -> Standing:
    calibration = expected_calibration_error(answers.confidence[known], right)
    return Standing(Accuracy.of(right), Accuracy.of(answers.in_top_5[known]), calibration)


def _answers(probabilities: Floats, places: Indices, labels: Indices) -> Answers:
    named = probabilities.argmax(axis=1).astype(np.int64)
    rows = np.arange(len(named))
    # As in a list sorted by probability: of equally likely classes the earlier ones come first. A class that the model
    # does not know is in no list of its.
    own = probabilities[rows, np.maximum(labels, 0)][:, None]
    ahead = (probabilities > own).sum(axis=1)
    ahead += ((probabilities == own) & (np.arange(probabilities.shape[1]) < labels[:, None])).sum(axis=1)
    in_top = (ahead < TOP_K) & np.isin(labels, places)
    return Answers(named, in_top, np.clip(probabilities[rows, named], 0, 1))


def verdict(evidence: Evidence, a: str, b: str, alpha: float = ALPHA) -> str:
    """Return in a sentence which of the models named `a` and `b` is better."""
    found = evidence.labelled
    if found is None:
        share = evidence.num_disagreements / max(1, evidence.num_images)
        return f"{a} and {b} name different classes for {share:.1%} of {evidence.num_images:,} images without labels."
    p, (low, high) = found.table.mid_p, found.interval
    figures = (
        f"{found.table.accuracy_b:.2%} against {found.table.accuracy_a:.2%} of {found.table.num_examples:,} images, "
        f"a difference of {100 * found.difference:+.2f} points (95 % interval {100 * low:+.2f} to {100 * high:+.2f}; "
        f"McNemar mid-p {p:.2g})"
    )
    if p > alpha:
        return f"No difference is shown between {a} and {b}: {b} names {figures} right."
    better, worse = (b, a) if found.difference > 0 else (a, b)
    return f"{better} is better than {worse}: {b} names {figures} right."
