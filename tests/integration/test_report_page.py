"""The report of a comparison as a browser shows it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chromium import ask, needs_chromium
from comparisons import comparison
from factories import png

from tandem.comparison.evidence import verdict
from tandem.comparison.report import write_report
from tandem.comparison.results import Comparison

pytestmark = needs_chromium

_SHAPE = """
  const images = [...document.images];
  await Promise.all(images.map(image => image.decode()));
  const rules = [...document.styleSheets].flatMap(sheet => [...sheet.cssRules]);
  return {
    lang: document.documentElement.lang,
    title: document.title,
    verdict: document.getElementById("verdict")?.textContent,
    headings: [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(each => Number(each.tagName[1])),
    main: document.querySelectorAll("main").length,
    images: images.map(image => [image.alt, image.naturalWidth, image.getBoundingClientRect().width]),
    inputs: [...document.querySelectorAll("input, select, button")].map(each => each.labels.length),
    headless: [...document.querySelectorAll("th")].filter(each => !each.scope || !each.textContent.trim()).length,
    loaded: performance.getEntriesByType("resource").map(each => each.name),
    addresses: [...document.querySelectorAll("[src], [href]")].map(each => each.src || each.href),
    print: rules.filter(rule => rule.media?.mediaText === "print").map(rule => rule.cssText).join(),
    sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    bars: [...document.querySelectorAll(".bar")].map(each => each.getBoundingClientRect().width),
    values: [...document.querySelectorAll(".plot .value")].map(each => Number(each.textContent.slice(1))),
    bits: document.querySelectorAll(".card header .soft").length,
  };
"""
_USE = """
  const choose = (id, value, kind = "change") => {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event(kind));
  };
  const shown = () => [...document.querySelectorAll(".card")]
    .filter(card => card.offsetParent !== null)
    .map(({ dataset }) => [dataset.name, dataset.kind, dataset.label]);
  const found = { first: shown(), count: document.getElementById("count").textContent };
  for (const kind of ["only-a", "only-b", "neither"]) {
    choose("kind", kind);
    found[kind] = shown();
  }
  choose("search", " VAL_1", "input");
  found.both = shown();
  found.bothCount = document.getElementById("count").textContent;
  choose("kind", "");
  found.searched = shown();
  choose("search", "CLASS 2", "input");
  found.ofClass = shown();
  choose("search", "no such file", "input");
  found.none = shown();
  choose("search", "", "input");
  choose("order", "name");
  found.byName = shown();
  choose("order", "label");
  found.byLabel = shown();
  choose("order", "apart");
  found.again = shown();
  return found;
"""


def page_of(answer: Comparison) -> str:
    return write_report(answer, "tiny:1 and tiny:2 compared", lambda name: png(int(name.split("_")[1].split(".")[0])))


def agreeing(answer: Comparison) -> Comparison:
    return replace(answer, results=tuple(replace(pair, b=pair.a, agree=True) for pair in answer.results))


@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("kind", ["labelled", "unlabelled", "agreeing", "long names"])
def test_a_page_is_whole_readable_and_asks_nothing_of_the_network(tmp_path: Path, kind: str, width: int) -> None:
    made: dict[str, Callable[[], Comparison]] = {
        "labelled": comparison,
        "unlabelled": lambda: comparison(labelled=False),
        "agreeing": lambda: agreeing(comparison()),
        "long names": lambda: comparison(name="val/" + "n" * 200 + "/val_{}.JPEG"),
    }
    answer = made[kind]()
    found = ask(page_of(answer), _SHAPE, tmp_path, width)
    assert found["problems"] == []
    assert (found["lang"], found["title"], found["main"]) == ("en", "tiny:1 and tiny:2 compared", 1)
    evidence = answer.summary.evidence
    assert evidence is not None
    assert found["verdict"] == verdict(evidence, "tiny:1", "tiny:2")
    assert found["headings"][0] == 1
    assert found["headings"].count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(found["headings"]))
    assert [alt.split(",")[0] for alt, *_ in found["images"]] == [pair.name for pair in answer.ranked]
    assert all(natural == 32 and width > 0 for _, natural, width in found["images"])
    assert found["inputs"] == ([1] * 3 if answer.disagreements else [])
    assert found["headless"] == 0, "each heading of a table says of what, in words"
    assert found["loaded"] == []
    assert all(address.startswith("data:image/") for address in found["addresses"])
    assert ".controls { display: none; }" in found["print"]
    assert found["sideways"] == 0, "the page itself never scrolls sideways"


def test_the_plot_is_to_scale(tmp_path: Path) -> None:
    found = ask(page_of(comparison()), _SHAPE, tmp_path)
    bars, values = found["bars"], found["values"]
    assert len(bars) == len(values) > 3
    assert values == sorted(values, reverse=True)
    for bar, value in zip(bars, values, strict=True):
        assert bar == pytest.approx(max(2, bars[0] * value / values[0]), abs=1.5)


def test_the_images_are_filtered_and_sorted(tmp_path: Path) -> None:
    answer = comparison()
    found = ask(page_of(answer), _USE, tmp_path)
    assert found["problems"] == []

    def names(key: str) -> list[str]:
        return [name for name, *_ in found[key]]

    ranked = [pair.name for pair in answer.ranked]
    assert names("first") == names("again") == ranked
    assert found["count"] == f"{len(ranked)} shown"
    kinds: dict[str, list[str]] = {"only-a": [], "only-b": [], "neither": []}
    for pair in answer.ranked:
        right = (pair.a[0].id == pair.label, pair.b[0].id == pair.label)
        kinds[{(True, False): "only-a", (False, True): "only-b"}.get(right, "neither")].append(pair.name)
    for kind, expected in kinds.items():
        assert names(kind) == expected
        assert expected, f"there is one that is {kind}"
    with_1 = [name for name in ranked if "val_1" in name]
    assert names("searched") == with_1
    assert names("both") == [name for name in with_1 if name in kinds["neither"]]
    assert found["bothCount"] == f"{len(found['both'])} shown"
    of_class = [pair.name for pair in answer.ranked if "n2" in (pair.label, pair.a[0].id, pair.b[0].id)]
    assert names("ofClass") == of_class
    assert names("none") == []
    assert names("byName") == sorted(ranked, key=_number)
    assert found["byLabel"] == sorted(found["first"], key=lambda each: each[2])


def _number(name: str) -> Any:
    return int(name.split("_")[1].split(".")[0])
