"""The predictions file: written whole, read line by line, refused with one line; and two of them compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import class_names

from tandem.comparison.predictions import (
    Header,
    Prediction,
    ScoredId,
    compare_predictions,
    read_predictions,
    write_predictions,
)
from tandem.errors import Conflict, InvalidRequest, VolumeUnavailable

IDS = ("cat", "dog", "été 犬")
LABELS = ("cat", "cat", "dog", "été 犬")


def header(**changes: Any) -> Header:
    values = {
        "model": "tiny:3",
        "run_id": "run-a",
        "step": 7,
        "architecture": "resnet18",
        "precision": "float32",
        "dataset": "pets",
        "dataset_fingerprint": "0" * 64,
        "split": "val",
        "num_images": len(LABELS),
        "classes": class_names(IDS),
    }
    return Header.model_validate({**values, **changes})


def rows(*answers: str) -> list[Prediction]:
    return [
        Prediction(
            file=f"val/{label}/{number}.png",
            label=label,
            top_k=(ScoredId(id=answer, probability=0.75), ScoredId(id="dog", probability=0.25)),
        )
        for number, (label, answer) in enumerate(zip(LABELS, answers, strict=True))
    ]


ALL_RIGHT = rows(*LABELS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_predictions(tmp_path / "p.jsonl", header(), ALL_RIGHT)
    return tmp_path / "p.jsonl"


def test_what_is_written_is_read(path: Path) -> None:
    found, images = read_predictions(path)
    assert found == header()
    assert list(images) == ALL_RIGHT
    first, second, *_ = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    assert {"format": "tandem-predictions", "format_version": 1, "model": "tiny:3", "num_images": 4}.items() <= (
        first.items()
    )
    assert second == {
        "file": "val/cat/0.png",
        "label": "cat",
        "top_k": [{"id": "cat", "probability": 0.75}, {"id": "dog", "probability": 0.25}],
    }
    assert [each.name for each in path.parent.iterdir()] == ["p.jsonl"], "nothing temporary stays"


def test_a_file_that_can_not_be_written_is_an_error_and_leaves_the_old_one(path: Path, tmp_path: Path) -> None:
    def failing() -> Any:
        yield ALL_RIGHT[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_predictions(path, header(), failing())
    assert len(list(read_predictions(path)[1])) == 4
    with pytest.raises(VolumeUnavailable, match="can't write"):
        write_predictions(tmp_path / "nowhere" / "p.jsonl", header(), ALL_RIGHT)


def keep_lines(count: int) -> Callable[[bytes], bytes]:
    return lambda data: b"".join(data.splitlines(keepends=True)[:count])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "is no predictions file"),
        (lambda data: b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is no predictions file"),
        (lambda data: b'["tandem-predictions"]\n', "is no predictions file"),
        (lambda data: b"[" * 100_000, "is no predictions file"),
        (lambda data: data.replace(b'"format_version":1', b'"format_version":2'), "version 2; this Tandem reads"),
        (lambda data: data.replace(b'"split":"val",', b""), r"damaged first line \(split: Field required\)"),
        (keep_lines(3), "cut short, at image 3 of 4"),
        (lambda data: data[:-1], "cut short, at image 4 of 4"),
        (lambda data: data[:-20], "cut short, at image 4 of 4"),
        (lambda data: data + b"{}\n", "has more images than the 4"),
        (lambda data: data.replace(b'"label":"dog"', b'"label":7'), r"damaged at image 3 \(line 4\)"),
        (lambda data: data.replace(b"cat/0.png", b"c\xff/0.png"), "damaged at image 1"),
    ],
)
def test_what_is_damaged_or_something_else_is_refused(path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InvalidRequest, match=says) as caught:
        list(read_predictions(path)[1])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="can't read"):
        read_predictions(tmp_path / name)


def test_a_comparison_by_hand(path: Path, tmp_path: Path) -> None:
    # The other model orders the classes differently, and does not know all of them.
    other = tmp_path / "other.jsonl"
    names = class_names(("bird", "dog", "cat"))
    write_predictions(other, header(model="run:run-b/9", step=9, classes=names), rows("cat", "bird", "bird", "cat"))
    answer = compare_predictions(path, other, top_k=1)
    summary = answer.summary
    assert (summary.num_images, summary.num_disagreements, summary.num_errors) == (4, 3, 0)
    assert summary.labelled is not None
    assert (summary.labelled.both_right, summary.labelled.only_a_right) == (1, 3)
    assert summary.labelled.exact_p == pytest.approx(2 / 8)
    assert [each.name for each in answer.disagreements] == ["val/cat/1.png", "val/dog/2.png", "val/été 犬/3.png"]
    assert [(each.index, each.id, each.probability) for each in answer.disagreements[0].b] == [(0, "bird", 0.75)]
    assert (summary.a.name, summary.a.version, summary.a.label) == ("tiny", 3, "tiny:3")
    assert (summary.b.name, summary.b.run_id, summary.b.step) == ("", "run-a", 9)


def test_a_file_agrees_with_itself(path: Path) -> None:
    answer = compare_predictions(path, path)
    assert answer.summary.num_disagreements == 0
    assert answer.results == ()


@pytest.mark.parametrize(
    ("changes", "images", "says"),
    [
        ({"dataset_fingerprint": "1" * 64}, ALL_RIGHT, r"other datasets: pets \(000000000000\) and pets \(111"),
        ({"split": "test"}, ALL_RIGHT, "other splits: val and test"),
        ({"num_images": 2}, ALL_RIGHT[:2], "other numbers of images: 4 and 2"),
        ({}, ALL_RIGHT[::-1], "not of the same images"),
    ],
)
def test_other_images_can_not_be_compared(
    path: Path, tmp_path: Path, changes: dict[str, Any], images: list[Prediction], says: str
) -> None:
    write_predictions(tmp_path / "other.jsonl", header(**changes), images)
    with pytest.raises(Conflict, match=says):
        compare_predictions(path, tmp_path / "other.jsonl")


def test_a_dataset_of_another_name_with_the_same_content_can_be_compared(path: Path, tmp_path: Path) -> None:
    write_predictions(tmp_path / "other.jsonl", header(dataset="copy"), ALL_RIGHT)
    assert compare_predictions(path, tmp_path / "other.jsonl").summary.num_disagreements == 0
