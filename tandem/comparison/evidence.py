"""What speaks for one of two classifiers, as plain frozen values; `weighing` computes them.

Shares and differences of shares are within 0 and 1, or -1 and 1; differences are b - a; intervals are of 95 %.
"""

from dataclasses import dataclass
from typing import NamedTuple

from tandem.comparison.paired import PairedTable

ALPHA = 0.05


class Interval(NamedTuple):
    """From `low` to `high`, in the units of what it is of."""

    low: float
    high: float


class Share(NamedTuple):
    """A share of the labelled images, with its interval."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Standing:
    """One model on the labelled images: accuracy@1 and @5, and its expected calibration error."""

    top_1: Share
    top_5: Share
    calibration_error: float


class ClassDifference(NamedTuple):
    """One class with labelled images: its paired table, the mid-p of McNemar's test, and that adjusted for all classes
    (see `by_class`)."""

    id: str
    table: PairedTable
    p: float
    adjusted_p: float

    @property
    def difference(self) -> float:
        """Accuracy b - accuracy a."""
        return self.table.accuracy_b - self.table.accuracy_a


@dataclass(frozen=True)
class Labelled:
    """What the labels say: the paired table and all that follows from it; `interval` is of the difference."""

    table: PairedTable
    a: Standing
    b: Standing
    interval: Interval
    by_class: tuple[ClassDifference, ...]

    @property
    def difference(self) -> float:
        """Accuracy b - accuracy a."""
        return self.table.accuracy_b - self.table.accuracy_a


@dataclass(frozen=True)
class Evidence:
    """Of all images that both models answered.

    `kappa` is Cohen's, None where it says nothing; `divergence` the mean Jensen-Shannon divergence of the predictions,
    in bits, None where only the likeliest classes are known; `labelled` is None without a label; `only_in_a` and
    `only_in_b` are the ids of classes that the other model does not know.
    """

    num_images: int
    num_disagreements: int
    kappa: float | None
    divergence: float | None
    labelled: Labelled | None
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()


def verdict(evidence: Evidence, a: str, b: str, alpha: float = ALPHA) -> str:
    """Return in a sentence which of the models named `a` and `b` is better."""
    found = evidence.labelled
    if not evidence.num_images:
        return f"Nothing is known of {a} and {b}: there is no image that both answered."
    if found is None:
        share = evidence.num_disagreements / evidence.num_images
        return f"{a} and {b} name different classes for {share:.1%} of {evidence.num_images:,} images without labels."
    p, points, (low, high) = found.table.mid_p, 100 * found.difference, found.interval
    figures = (
        f"{b} is right on {found.table.accuracy_b:.2%} of {found.table.num_examples:,} images, {a} on "
        f"{found.table.accuracy_a:.2%}, a difference of {points:+.2f} points (95 % interval {100 * low:+.2f} to "
        f"{100 * high:+.2f}; McNemar mid-p {p:.2g})"
    )
    if p > alpha:
        return f"No difference is shown between {a} and {b}: {figures}."
    better, worse = (b, a) if found.difference > 0 else (a, b)
    return f"{better} is better than {worse}: {figures}."
