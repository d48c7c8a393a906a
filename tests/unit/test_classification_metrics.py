"""Accuracy, confusion and calibration: worked by hand, and over whatever predictions there may be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix as reference_confusion

from tandem.comparison.calibration import expected_calibration_error, reliability_table
from tandem.comparison.classification import accuracy_at, class_accuracy, confusion_matrix, mean_loss

LABELS = np.array([0, 1, 2, 2])
TOP = np.array([[0, 1, 2], [0, 1, 2], [2, 0, 1], [1, 0, 2]])


@pytest.mark.parametrize(("k", "percent"), [(1, 50.0), (2, 75.0), (3, 100.0), (5, 100.0)])
def test_accuracy_at_k_by_hand_also_with_fewer_than_k_classes(k: int, percent: float) -> None:
    assert accuracy_at(TOP, LABELS, k) == percent


def test_confusion_and_class_accuracy_by_hand() -> None:
    confusion = confusion_matrix(LABELS, TOP[:, 0], 4)
    assert confusion.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    num_images, percent = class_accuracy(confusion)
    assert num_images.tolist() == [1, 1, 2, 0]
    assert percent[:3].tolist() == [100.0, 0.0, 50.0]
    assert np.isnan(percent[3]), "no image says nothing of a class"


def test_the_mean_loss_is_summed_in_float64() -> None:
    losses = np.full(2**17, 0.1, dtype=np.float32)
    assert mean_loss(losses) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize("call", [lambda none: mean_loss(none), lambda none: accuracy_at(none[:, None], none, 1)])
def test_no_images_have_no_accuracy(call: object) -> None:
    with pytest.raises(ValueError, match="no images"):
        call(np.array([], dtype=np.int64))  # type: ignore[operator]


# By hand, two bins: confidences 0.6 and 0.9 (one of two right: |0.5 - 0.75|), and 0.5 (right: |1 - 0.5|).
def test_calibration_error_by_hand() -> None:
    confidences, right = np.array([0.6, 0.9, 0.5]), np.array([True, False, True])
    assert expected_calibration_error(confidences, right, num_bins=2) == pytest.approx((2 * 0.25 + 0.5) / 3)
    low, high = reliability_table(confidences, right, num_bins=2)
    assert low == (0.0, 0.5, 1, 1.0, 0.5), "an upper edge belongs to its bin"
    assert (high.lower, high.upper, high.num_images, high.accuracy) == (0.5, 1.0, 2, 0.5)
    assert high.confidence == pytest.approx(0.75)


def test_a_classifier_that_is_sure_and_right_is_calibrated_and_one_that_is_sure_and_wrong_is_not() -> None:
    sure = np.ones(7, dtype=np.float32)
    assert expected_calibration_error(sure, np.ones(7, dtype=bool)) == 0.0
    assert expected_calibration_error(sure, np.zeros(7, dtype=bool)) == 1.0


@pytest.mark.parametrize("confidence", [float("nan"), 1.5, -0.1])
def test_what_is_no_probability_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        reliability_table(np.array([0.5, confidence]), np.array([True, True]))


@st.composite
def predictions(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    num_images, num_classes = draw(st.integers(1, 60)), draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.normal(size=(num_images, num_classes)) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return rng.integers(num_classes, size=num_images), np.argsort(-probabilities, axis=1), np.sort(probabilities)[:, -1]


@given(predictions())
def test_the_metrics_agree_with_each_other(
    drawn: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
) -> None:
    labels, top, confidences = drawn
    num_images, num_classes = top.shape
    shares = [accuracy_at(top, labels, k) for k in range(1, num_classes + 1)]
    assert shares == sorted(shares)
    assert shares[-1] == 100.0
    confusion = confusion_matrix(labels, top[:, 0], num_classes)
    assert (confusion == reference_confusion(labels, top[:, 0], labels=range(num_classes))).all()
    counts, percent = class_accuracy(confusion)
    assert np.nansum(counts * percent) / num_images == pytest.approx(shares[0])
    right = top[:, 0] == labels
    table = reliability_table(confidences, right)
    assert sum(each.num_images for each in table) == num_images
    assert all(each.lower <= each.confidence <= each.upper for each in table)
    error = expected_calibration_error(confidences, right)
    # No closer than the difference of the means: it is their difference bin by bin.
    assert abs(confidences.mean() - right.mean()) - 1e-9 <= error <= 1.0
    assert expected_calibration_error(confidences, right, num_bins=1) == pytest.approx(
        abs(confidences.mean() - right.mean())
    )
