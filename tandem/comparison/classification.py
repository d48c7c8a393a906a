"""How right a classifier is on N labelled images, as pure functions on arrays.

Shapes and units: `labels` and `predicted` (N,) are class indices; `top_classes` (N, k) are class indices, the most
probable first; accuracies are percentages, as the field reports accuracy@1 and accuracy@5.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]


class ClassAccuracy(NamedTuple):
    """Of each of C classes: `num_images` (C,), and `percent` (C,) of them that are named right, NaN where none are."""

    num_images: Indices
    percent: Floats


def accuracy_at(top_classes: Indices, labels: Indices, k: int) -> float:
    """Return the share, in percent, of images whose label is among their `k` most probable classes.

    Where `top_classes` (N, m) has fewer than `k` columns, because there are fewer classes, all of them count
    (Russakovsky et al. 2015, section 4.1, defines the top-5 error). Raises ValueError for no images.
    """
    _require(labels)
    right = (top_classes[:, :k] == labels[:, None]).any(axis=1)
    return 100 * float(right.mean())


def confusion_matrix(labels: Indices, predicted: Indices, num_classes: int) -> Indices:
    """Return counts (C, C): in row i and column j the images of class i that are named class j."""
    counts = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.astype(np.int64).reshape(num_classes, num_classes)


def class_accuracy(confusion: Indices) -> ClassAccuracy:
    """Return count and accuracy of each class, from the confusion matrix (C, C)."""
    num_images = confusion.sum(axis=1)
    percent = np.full(len(confusion), np.nan)
    np.divide(100.0 * confusion.diagonal(), num_images, out=percent, where=num_images > 0)
    return ClassAccuracy(num_images, percent)


def mean_loss(losses: NDArray[np.floating]) -> float:
    """Return the mean of `losses` (N,), in nats, summed in float64; raise ValueError for none."""
    _require(losses)
    return float(losses.mean(dtype=np.float64))


def _require(values: NDArray[np.generic]) -> None:
    if not len(values):
        raise ValueError("there are no images")
