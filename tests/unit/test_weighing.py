"""Evidence of two classifiers, from probabilities whose answers are known."""

import numpy as np
import pytest

from tandem.comparison.evidence import verdict
from tandem.comparison.matching import MatchedClasses
from tandem.comparison.paired import PairedTable
from tandem.comparison.weighing import Floats, Predictions, Recorder
from tandem.data.manifest import ClassName


def classes(names: str) -> tuple[ClassName, ...]:
    return tuple(ClassName(id=name, words=name) for name in names)


def rows_of(*rows: list[float]) -> Floats:
    return np.array(rows, np.float32)


def predictions(rows: Floats) -> Predictions:
    return Predictions(rows, np.argsort(-rows, axis=1, kind="stable"))


def random_rows(seed: int, num_rows: int, num_classes: int) -> Floats:
    return np.random.default_rng(seed).dirichlet(np.full(num_classes, 0.4), size=num_rows).astype(np.float32)


def test_classes_are_matched_by_id() -> None:
    matched = MatchedClasses.of(classes("abc"), classes("dcb"))
    assert [each.id for each in matched.all] == ["a", "b", "c", "d"]
    assert (matched.place_a.tolist(), matched.place_b.tolist()) == ([0, 1, 2], [3, 2, 1])
    assert [each.id for each in matched.only_in_a] == ["a"]
    assert [each.id for each in matched.only_in_b] == ["d"]
    assert matched.num_shared == 2
    assert MatchedClasses.of(classes("ab"), classes("cd")).num_shared == 0
    spread = matched.spread(rows_of([0.5, 0.3, 0.2]), matched.place_b)
    assert spread.tolist() == [[0, *rows_of([0.2, 0.3, 0.5])[0].tolist()]]


def test_a_model_and_itself() -> None:
    recorder = Recorder(MatchedClasses.of(classes("abcdefgh"), classes("abcdefgh")))
    rows = random_rows(1, 200, 8)
    for first in range(0, 200, 32):
        part = rows[first : first + 32]
        recorder.add(predictions(part), predictions(part), np.arange(first, first + len(part)) % 8)
    found = recorder.evidence()
    assert (found.num_images, found.num_disagreements, found.kappa, found.divergence) == (200, 0, 1.0, 0.0)
    assert found.labelled is not None
    assert found.labelled.a == found.labelled.b
    assert (found.labelled.difference, found.labelled.table.mid_p) == (0.0, 1.0)
    assert verdict(found, "m:1", "m:1").startswith("No difference is shown between m:1 and m:1")


def test_many_small_batches_say_what_a_large_one_does() -> None:
    matched, labels = MatchedClasses.of(classes("abcdef"), classes("abcdef")), np.arange(1300) % 6
    a, b = (predictions(random_rows(seed, 1300, 6)) for seed in (4, 5))
    whole, parts = Recorder(matched), Recorder(matched)
    whole.add(a, b, labels)
    for place in range(1300):
        row = slice(place, place + 1)
        one, other = (Predictions(each.probabilities[row], each.ranked[row]) for each in (a, b))
        parts.add(one, other, labels[row])
    assert parts.evidence() == whole.evidence()


def test_each_figure_of_models_that_order_their_classes_differently() -> None:
    matched = MatchedClasses.of(classes("abcdefgh"), classes("hgfedcba"))
    recorder, labels = Recorder(matched), np.arange(300) % 8
    a, b = random_rows(2, 300, 8), random_rows(3, 300, 8)
    # b names the label of every other image.
    b[::2] = 0.01
    b[np.arange(0, 300, 2), 7 - labels[::2]] = 0.93
    recorder.add(predictions(a), predictions(b), labels)
    found = recorder.evidence()
    straight = b[:, ::-1]
    assert found.num_disagreements == int((a.argmax(1) != straight.argmax(1)).sum())
    assert found.labelled is not None
    standings = (found.labelled.a, found.labelled.b)
    for rows, standing in zip((a, straight), standings, strict=True):
        best = np.argsort(-rows, axis=1, kind="stable")
        assert standing.top_1.value == pytest.approx(float((best[:, 0] == labels).mean()))
        assert standing.top_5.value == pytest.approx(float((best[:, :5] == labels[:, None]).any(1).mean()))
        assert standing.top_1.interval.low < standing.top_1.value < standing.top_1.interval.high
    assert found.labelled.interval.low > 0.2
    assert sum(each.table.num_examples for each in found.labelled.by_class) == 300
    said = verdict(found, "old:1", "new:2")
    assert said.startswith("new:2 is better than old:1: new:2 is right on ")
    shares = [f"{standing.top_1.value:.2%}" for standing in standings]
    assert f"new:2 is right on {shares[1]} of 300 images, old:1 on {shares[0]}, a difference of +" in said
    assert verdict(found, "old:1", "new:2", alpha=0.0).startswith("No difference is shown")


def test_a_label_that_a_model_does_not_know_is_never_right() -> None:
    recorder = Recorder(MatchedClasses.of(classes("ab"), classes("abc")))
    recorder.add(predictions(rows_of([0.6, 0.4])), predictions(rows_of([0.2, 0.2, 0.6])), np.array([2]))
    found = recorder.evidence().labelled
    assert found is not None
    assert found.table == PairedTable(only_b_right=1)
    assert (found.a.top_5.value, found.b.top_5.value) == (0.0, 1.0)


def test_without_labels_and_without_images() -> None:
    recorder = Recorder(MatchedClasses.of(classes("abc"), classes("abc")))
    nothing = recorder.evidence()
    assert (nothing.num_images, nothing.num_disagreements, nothing.divergence, nothing.labelled) == (0, 0, 0.0, None)
    assert nothing.kappa is None
    recorder.add(
        predictions(rows_of([1, 0, 0], [0, 1, 0])), predictions(rows_of([1, 0, 0], [0, 0, 1])), np.array([-1, -1])
    )
    found = recorder.evidence()
    assert (found.num_images, found.num_disagreements, found.divergence) == (2, 1, 0.5)
    assert verdict(found, "a", "b") == "a and b name different classes for 50.0% of 2 images without labels."


def test_one_image_says_little() -> None:
    recorder = Recorder(MatchedClasses.of(classes("ab"), classes("ab")))
    recorder.add(predictions(rows_of([0.9, 0.1])), predictions(rows_of([0.1, 0.9])), np.array([1]))
    found = recorder.evidence()
    assert found.labelled is not None
    assert found.labelled.table == PairedTable(only_b_right=1)
    assert found.labelled.interval.low < 0
    assert verdict(found, "a", "b").startswith("No difference is shown")
