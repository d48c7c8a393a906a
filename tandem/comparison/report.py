"""The report of a comparison: one HTML page that needs no network, with the images inside it."""

import base64
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from tandem.comparison.evidence import ALPHA, ClassDifference, Evidence, verdict
from tandem.comparison.results import Comparison, PairResult

# Of the images that differ, those furthest apart: a page of some tens of MB at the most.
MAX_IMAGES = 500
MAX_CLASSES = 60
MAX_CONFUSIONS = 20

_MEDIA = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp", b"BM": "image/bmp", b"GI": "image/gif"}


@dataclass(frozen=True)
class Confusion:
    """A pair of classes, true and named, and how often each model takes the one for the other."""

    label: str
    named: str
    a: int
    b: int


def write_report(answer: Comparison, title: str, read_image: Callable[[str], bytes | None]) -> str:
    """Return the page; `read_image` returns the bytes of the image of a name, None where it is not at hand."""
    evidence = answer.summary.evidence
    words = _words(answer)
    shown = answer.ranked[:MAX_IMAGES]
    classes = by_difference(evidence) if evidence else []
    page: str = _template().render(
        title=title,
        a=answer.summary.a,
        b=answer.summary.b,
        summary=answer.summary,
        evidence=evidence,
        found=evidence.labelled if evidence else None,
        verdict=verdict(evidence, answer.summary.a.label, answer.summary.b.label) if evidence else "",
        classes=classes[:MAX_CLASSES],
        num_classes=len(classes),
        # The longest bar.
        widest=abs(classes[0].difference) if classes else 1.0,
        num_significant=sum(each.adjusted_p <= ALPHA for each in classes),
        words=words,
        alpha=ALPHA,
        confusions=confusions(answer.disagreements)[:MAX_CONFUSIONS],
        cards=[_card(pair, read_image(pair.name)) for pair in shown],
        num_differing=len(answer.disagreements),
        failures=answer.failures,
    )
    return page


def by_difference(evidence: Evidence) -> list[ClassDifference]:
    """Return the classes on which the models differ, the largest difference first."""
    found = evidence.labelled.by_class if evidence.labelled else ()
    differing = [each for each in found if each.table.only_a_right != each.table.only_b_right]
    return sorted(differing, key=lambda each: (-abs(each.difference), each.id))


def confusions(pairs: Sequence[PairResult]) -> list[Confusion]:
    """Return which wrong answers one model gives more often than the other, the largest change first.

    `pairs` are those that differ: where both name one class, both counts are the same.
    """
    wrong = [(pair.label, pair.a[0].id, pair.b[0].id) for pair in pairs if pair.label]
    of_a = Counter((label, named) for label, named, _ in wrong if label != named)
    of_b = Counter((label, named) for label, _, named in wrong if label != named)
    changed = [Confusion(*each, of_a[each], of_b[each]) for each in {*of_a, *of_b} if of_a[each] != of_b[each]]
    return sorted(changed, key=lambda each: (-abs(each.b - each.a), each.label, each.named))


def _words(answer: Comparison) -> Mapping[str, str]:
    """Return what a person calls each class that is named, by its id; the id where nothing else is known."""
    scored = (each for pair in answer.results for each in (*pair.a, *pair.b))
    return {each.id: each.words.split(",")[0] or each.id for each in scored}


def _card(pair: PairResult, data: bytes | None) -> dict[str, Any]:
    right_a, right_b = pair.a[0].id == pair.label, pair.b[0].id == pair.label
    kinds = {(True, False): "only-a", (False, True): "only-b", (False, False): "neither"}
    return {
        "pair": pair,
        "kind": kinds[right_a, right_b] if pair.label else "unknown",
        "source": None if data is None else _data_uri(data),
    }


def _data_uri(data: bytes) -> str:
    media = _MEDIA.get(data[:2], "application/octet-stream")
    return f"data:{media};base64,{base64.b64encode(data).decode('ascii')}"


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("tandem.comparison", "."),
        autoescape=select_autoescape(["j2", "html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.2f} %"
    environment.filters["points"] = lambda share: f"{100 * share:+.2f}".replace("-", "−")
    return environment.get_template("report.html.j2")
