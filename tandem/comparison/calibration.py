"""Whether a classifier is right as often as it says: the expected calibration error, as pure functions on arrays.

Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks", equations 2 to 5: images are put into
M bins of equal width by their confidence (the probability of the class that is named), the m-th being
((m - 1) / M, m / M]. The error is the mean over all images of |accuracy − confidence| of their bin.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 15


class ReliabilityBin(NamedTuple):
    """The images whose confidence is in (lower, upper]; `accuracy` and mean `confidence` are shares, 0 to 1."""

    lower: float
    upper: float
    num_images: int
    accuracy: float
    confidence: float


def reliability_table(
    confidences: NDArray[np.floating], right: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> tuple[ReliabilityBin, ...]:
    """Return the bins that hold images, in order of confidence.

    `confidences` (N,) are probabilities, 0 to 1; `right` (N,) says whether the class that is named is the label.
    Raises ValueError for confidences that are no probabilities.
    """
    confidences = confidences.astype(np.float64)
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise ValueError("confidences are probabilities, 0 to 1")
    edges = np.arange(num_bins + 1) / num_bins
    # The bins have no place for a confidence of 0, which an argmax over classes can't have; it goes to the first.
    places = np.searchsorted(edges[1:], confidences, side="left")
    return tuple(
        ReliabilityBin(
            lower=float(edges[place]),
            upper=float(edges[place + 1]),
            num_images=int(np.count_nonzero(places == place)),
            accuracy=float(right[places == place].mean()),
            confidence=float(confidences[places == place].mean()),
        )
        for place in np.unique(places)
    )


def expected_calibration_error(
    confidences: NDArray[np.floating], right: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> float:
    """Return the expected calibration error, 0 to 1; raise ValueError for no images."""
    if not len(confidences):
        raise ValueError("there are no images")
    bins = reliability_table(confidences, right, num_bins)
    return sum(each.num_images * abs(each.accuracy - each.confidence) for each in bins) / len(confidences)
