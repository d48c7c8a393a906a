"""What two classifiers say of the same images, counted and recorded as it comes: for comparisons, and for shadows."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from services.inference.calls import rank
from services.inference.loading import ServedClassifier, version_of
from tandem.comparison.matching import MatchedClasses
from tandem.comparison.results import ComparisonSummary
from tandem.comparison.weighing import TOP_K, Predictions, Recorder
from tandem.errors import InvalidRequest


class Tally:
    """Counts results, and records what the evidence is computed from; it holds neither of the models."""

    def __init__(self, a: ServedClassifier, b: ServedClassifier) -> None:
        self.a, self.b = version_of(a), version_of(b)
        self.recorder = Recorder(MatchedClasses.of(a.card.classes, b.card.classes))
        self.num_errors = 0
        self._places = self.recorder.classes.index()

    def add(self, a: Predictions, b: Predictions, labels: Sequence[str]) -> list[float]:
        """Record N images with the class ids `labels`, empty where unknown; return how far apart the predictions for
        each are, in bits. A label that neither model knows says nothing of which is better."""
        places = np.array([self._places.get(label, -1) for label in labels], np.int64)
        divergence: list[float] = self.recorder.add(a, b, places).divergence.tolist()
        return divergence

    def summary(self) -> ComparisonSummary:
        """Return what was found; of many images it takes milliseconds."""
        evidence = self.recorder.evidence()
        return ComparisonSummary(
            a=self.a,
            b=self.b,
            num_images=evidence.num_images,
            num_disagreements=evidence.num_disagreements,
            num_errors=self.num_errors,
            labelled=None if evidence.labelled is None else evidence.labelled.table,
            evidence=evidence,
        )


def predictions(logits: Tensor) -> Predictions:
    """Return what logits (N, C) predict."""
    return Predictions(logits.softmax(1).numpy(), rank(logits, TOP_K).indices.numpy())


def check_common_class(a: ServedClassifier, b: ServedClassifier, field: str) -> None:
    """Raise InvalidRequest about `field` unless both models know a class."""
    if not MatchedClasses.of(a.card.classes, b.card.classes).num_shared:
        raise InvalidRequest(
            f"{a.located.label} and {b.located.label} know no class in common (as {a.card.classes[0].id!r} and "
            f"{b.card.classes[0].id!r}): there is nothing to compare",
            field=field,
        )
