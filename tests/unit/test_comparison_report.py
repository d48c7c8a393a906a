"""The report of a comparison: what it says, what it escapes, and that it needs no network."""

import re
from dataclasses import replace

import numpy as np
import pytest

from tandem.comparison.matching import MatchedClasses
from tandem.comparison.report import MAX_IMAGES, confusions, write_report
from tandem.comparison.results import Comparison, ComparisonSummary, ModelVersion, PairResult, ScoredClass, Timings
from tandem.comparison.weighing import Predictions, Recorder
from tandem.data.manifest import ClassName

CLASSES = tuple(ClassName(id=f"n{number}", words=f"class {number}, thing") for number in range(6))
A = ModelVersion("tiny", 1, "run-1", 10, "resnet18", "float32")
B = replace(A, version=2, run_id="run-2")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


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


def test_the_page_has_the_verdict_the_figures_and_every_image() -> None:
    answer = comparison()
    page = write_report(answer, "tiny:1 and tiny:2 compared", lambda _: PNG)
    assert "tiny:2 is better than tiny:1" in page
    assert page.count('<li class="card"') == len(answer.disagreements)
    for pair in answer.disagreements:
        assert f'data-name="{pair.name}"' in page
    assert page.count("data:image/png;base64,") == len(answer.disagreements)
    assert answer.summary.labelled is not None
    assert f"{answer.summary.labelled.mid_p:.3g} (mid-p)" in page
    places = [page.index(f'data-name="{pair.name}"') for pair in answer.ranked]
    assert places == sorted(places), "those furthest apart come first"


def test_the_page_asks_nothing_of_the_network() -> None:
    page = write_report(comparison(), "compared", lambda _: PNG)
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert not re.search(r"https?://|@import|url\(", page)


def test_what_comes_from_files_is_escaped() -> None:
    page = write_report(comparison(name="<script>alert({})</script>.png"), "<b>compared</b>", lambda _: None)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(" in page
    assert "<b>compared" not in page
    assert "not at hand" in page


def test_without_labels_there_is_what_remains() -> None:
    page = write_report(comparison(labelled=False), "compared", lambda _: None)
    assert "name different classes for" in page
    assert "McNemar" not in page.split("<script>")[0].split("</style>")[1]
    assert 'value="unknown"' in page


def test_models_that_agree_have_a_short_page() -> None:
    answer = comparison()
    same = tuple(replace(pair, b=pair.a, agree=True) for pair in answer.results)
    page = write_report(Comparison(same, answer.summary, Timings()), "compared", lambda _: None)
    assert "Where they disagree" not in page


def test_a_page_has_no_more_images_than_a_browser_bears() -> None:
    answer = comparison(1200)
    assert len(answer.disagreements) > MAX_IMAGES
    page = write_report(answer, "compared", lambda _: None)
    assert page.count('<li class="card"') == MAX_IMAGES
    assert f"{MAX_IMAGES} of {len(answer.disagreements)} images" in page


def test_confusions_count_what_one_model_alone_takes_for_another_class() -> None:
    x, y, z = (ScoredClass(place, name, name, 0.5) for place, name in enumerate("xyz"))
    pairs = [PairResult(str(number), "x", (y,), (z,)) for number in range(3)]
    pairs += [PairResult("right", "x", (x,), (z,)), PairResult("unknown", "", (y,), (x,))]
    found = [(each.label, each.named, each.a, each.b) for each in confusions(pairs)]
    assert found == [("x", "z", 0, 4), ("x", "y", 3, 0)]


@pytest.mark.parametrize(
    ("data", "media"), [(b"\xff\xd8\xff", "jpeg"), (b"BM", "bmp"), (b"RIFF", "webp"), (b"GIF8", "gif")]
)
def test_images_are_what_they_are(data: bytes, media: str) -> None:
    assert f"data:image/{media};base64," in write_report(comparison(), "compared", lambda _: data)
