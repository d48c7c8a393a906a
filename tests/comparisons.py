"""Comparisons of two made-up models, without a server."""

from dataclasses import replace

import numpy as np

from tandem.comparison.matching import MatchedClasses
from tandem.comparison.results import Comparison, ComparisonSummary, ModelVersion, PairResult, ScoredClass, Timings
from tandem.comparison.weighing import Predictions, Recorder
from tandem.data.manifest import ClassName

CLASSES = tuple(ClassName(id=f"n{number}", words=f"class {number}, thing") for number in range(6))
A = ModelVersion("tiny", 1, "run-1", 10, "resnet18", "float32")
B = replace(A, version=2, run_id="run-2")


def scored(row: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> tuple[ScoredClass, ...]:
    best = np.argsort(-row, kind="stable")[:5]
    return tuple(ScoredClass(int(each), CLASSES[each].id, CLASSES[each].words, float(row[each])) for each in best)


def comparison(num_images: int = 120, name: str = "val/val_{}.JPEG", labelled: bool = True) -> Comparison:
    """Return a comparison in which b is right more often."""
    chance = np.random.default_rng(5)
    labels = np.arange(num_images) % 6
    a, b = chance.dirichlet(np.full(6, 0.4), size=(2, num_images)).astype(np.float32)
    b[::2] = 0.02
    b[np.arange(0, num_images, 2), labels[::2]] = 0.9
    recorder = Recorder(MatchedClasses.of(CLASSES, CLASSES))
    known = labels if labelled else np.full(num_images, -1)
    of_a, of_b = (Predictions(rows, np.argsort(-rows, axis=1, kind="stable")) for rows in (a, b))
    apart = recorder.add(of_a, of_b, known).divergence
    pairs = []
    for place in range(num_images):
        one, other = scored(a[place]), scored(b[place])
        label = CLASSES[labels[place]].id if labelled else ""
        agree = one[0].id == other[0].id
        pairs.append(PairResult(name.format(place), label, one, other, agree, divergence=float(apart[place])))
    evidence = recorder.evidence()
    table = evidence.labelled.table if evidence.labelled else None
    summary = ComparisonSummary(A, B, num_images, evidence.num_disagreements, 0, table, evidence)
    return Comparison(tuple(pairs), summary, Timings())
