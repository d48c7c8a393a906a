"""Which classes one of two models is better at, with a correction for there being many.

Of each class McNemar's mid-p (see `paired`). With 200 classes ten are below 0.05 by chance alone, so p is adjusted by
Benjamini and Hochberg 1995 (Journal of the Royal Statistical Society B 57:289–300): of the classes whose adjusted p is
at most q, at most the share q is expected to be there by chance.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from tandem.comparison.classification import Indices
from tandem.comparison.evidence import ClassDifference
from tandem.comparison.paired import PairedTable

Flags = NDArray[np.bool_]


def class_differences(
    ids: Sequence[str], labels: Indices, right_a: Flags, right_b: Flags
) -> tuple[ClassDifference, ...]:
    """Return the difference on each class that has examples, in the order of the classes.

    `ids` (C,) are those of the classes, `labels` (N,) class indices; `right_a` and `right_b` (N,) say which examples
    each model gets right.
    """
    classes = np.unique(labels)
    tables = [tabulate_flags(right_a[labels == each], right_b[labels == each]) for each in classes]
    return tuple(
        ClassDifference(ids[index], table, table.mid_p, adjusted)
        for index, table, adjusted in zip(classes, tables, adjust([table.mid_p for table in tables]), strict=True)
    )


def tabulate_flags(right_a: Flags, right_b: Flags) -> PairedTable:
    """Count the 2×2 table of flags (N,)."""
    counts = np.bincount(2 * right_a.astype(np.int64) + right_b, minlength=4)
    neither, only_b, only_a, both = (int(count) for count in counts)
    return PairedTable(both, only_a, only_b, neither)


def adjust(p_values: Sequence[float]) -> list[float]:
    """Return the p of many tests, adjusted for their number (Benjamini and Hochberg)."""
    return [float(p) for p in false_discovery_control(p_values)] if len(p_values) else []
