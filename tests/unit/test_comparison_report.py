"""The report of a comparison: what it says, what it escapes, and that it needs no network."""

import re
from dataclasses import replace

import pytest
from comparisons import comparison

from tandem.comparison.report import MAX_IMAGES, confusions, write_report
from tandem.comparison.results import Comparison, PairResult, ScoredClass, Timings

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


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


def _luminance(colour: str) -> float:
    digits = "".join(each * 2 for each in colour) if len(colour) == 3 else colour
    channels = (int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4))
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_its_ground_in_light_and_dark() -> None:
    page = write_report(comparison(), "compared", lambda _: None)
    schemes = [dict(re.findall(r"--(\w+): #(\w+)", rule)) for rule in re.findall(r":root \{(.*?)\}", page)]
    assert len(schemes) == 2
    for colours in schemes:
        for text in ("ink", "soft", "a", "b"):
            for ground in ("paper", "card"):
                light, dark = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
                # WCAG's level AA for text of any size.
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
