"""The pictures for TensorBoard, by their pixels; and the HParams page, by what TensorBoard reads back."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from tensorboard.plugins.hparams import metadata  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from services.trainer.pictures import (
    Caption,
    Pixels,
    confident_mistakes,
    confusion_image,
    log_hparams,
    misclassified_grid,
)

YELLOW, PURPLE, GREY = (253, 231, 37), (68, 1, 84), (215, 215, 215)


def has(picture: Pixels, colour: tuple[int, ...]) -> int:
    """Return how many pixels have just this colour."""
    return int((picture == np.array(colour, dtype=np.uint8)[:, None, None]).all(axis=0).sum())


def test_the_surest_mistakes_come_first() -> None:
    labels, predicted = np.array([0, 1, 2, 3, 4]), np.array([0, 2, 1, 0, 0])
    sure = np.array([0.99, 0.4, 0.9, 0.4, 0.5])
    assert confident_mistakes(labels, predicted, sure) == [2, 4, 1, 3]
    assert confident_mistakes(labels, predicted, sure, limit=2) == [2, 4]
    assert confident_mistakes(labels, labels, sure) == []


@pytest.mark.parametrize(("count", "size"), [(0, 64), (1, 64), (7, 32), (36, 64), (50, 224)])
def test_the_grid_has_each_image_enlarged_and_at_most_36(count: int, size: int) -> None:
    colours = np.stack([np.arange(count) + 100, np.arange(count), np.full(count, 7)], axis=1).astype(np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(colours[:, :, None, None], (count, 3, size, size)))
    picture = misclassified_grid(pixels, [Caption("cat", "dog", 0.5)] * count)
    assert picture.dtype == np.uint8
    assert picture.shape[0] == 3
    counts = [has(picture, tuple(int(each) for each in colour)) for colour in colours]
    assert counts[:36] == [128 * 128] * min(count, 36), "≥ 96 px each, and no text over it"
    assert not any(counts[36:])


def test_small_pixels_stay_what_the_network_saw() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64), dtype=np.uint8)
    picture = misclassified_grid(pixels, [Caption("a", "b", 0.5)])
    assert (picture[:, 10:138, 10:138] == pixels[0].repeat(2, axis=1).repeat(2, axis=2)).all()


def test_the_caption_is_under_its_image() -> None:
    white = np.full((1, 3, 64, 64), 255, dtype=np.uint8)
    picture = misclassified_grid(white, [Caption("cat", "a very long name, with more to it than fits", 0.5)])
    ink = (picture != 255).any(axis=0)
    assert not ink[:138].any()
    assert ink[138:154].any(), "the true class"
    assert ink[154:170].any(), "the predicted class"
    assert not ink[:, 138:].any(), "a long name is cut"


@pytest.mark.parametrize("num_classes", [2, 10, 30, 31, 200, 1000, 2500])
def test_a_perfect_classifier_is_a_bright_diagonal(num_classes: int) -> None:
    names = [f"class {number}" for number in range(num_classes)]
    picture = confusion_image(10 * np.eye(num_classes, dtype=np.int64), names)
    assert picture.shape[0] == 3
    assert min(picture.shape[1:]) >= 200
    assert max(picture.shape[1:]) <= 1300
    yellow, purple = has(picture, YELLOW), has(picture, PURPLE)
    cells = min(num_classes, 833)  # of 2,500 classes three share a cell's row
    # The colour bar has some of each colour, and numbers stand in the cells of few classes.
    assert purple / yellow == pytest.approx(cells - 1, rel=0.25)


def test_rows_are_true_columns_predicted_and_an_empty_row_is_grey() -> None:
    matrix = np.array([[0, 4, 0], [0, 4, 0], [0, 0, 0]])
    picture = confusion_image(matrix, ["a", "b", "c"])
    (left, right), (top, bottom) = _bounds(picture)
    side = (right - left) // 3

    def colour(row: int, column: int) -> tuple[int, ...]:
        # Off the middle of the cell, where its number stands.
        return tuple(picture[:, top + row * side + 10, left + column * side + 10].tolist())

    assert [[colour(row, column) for column in range(3)] for row in range(3)] == [
        [PURPLE, YELLOW, PURPLE],
        [PURPLE, YELLOW, PURPLE],
        [GREY, GREY, GREY],
    ]
    assert bottom - top == pytest.approx(2 * side, abs=2), "the empty row lies below what is coloured"


def _bounds(picture: Pixels) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return where the first purple column begins and the matrix ends, and its coloured rows."""
    purple = (picture == np.array(PURPLE, dtype=np.uint8)[:, None, None]).all(axis=0)
    # The colour bar has a row or two of it only.
    columns = np.flatnonzero(purple.sum(axis=0) > 20)
    rows = np.flatnonzero(purple[:, columns[0]])
    return (int(columns[0]), int(columns[-1]) + 1), (int(rows[0]), int(rows[-1]) + 1)


def test_rare_confusions_show() -> None:
    shares = np.array([[98, 2], [0, 100]])
    picture = confusion_image(shares, ["a", "b"])
    (left, _), (top, _) = _bounds(confusion_image(np.array([[1, 0], [0, 1]]), ["a", "b"]))
    rare = picture[:, top + 10, left - 10].astype(int)
    assert np.abs(rare - PURPLE).sum() > 60, "2 % is seen beside 0 %"


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_names_of_any_characters_are_drawn(true: str, predicted: str) -> None:
    misclassified_grid(np.zeros((1, 3, 8, 8), dtype=np.uint8), [Caption(true, predicted, 0.5)])
    confusion_image(np.eye(2, dtype=np.int64), [true, predicted])


@pytest.mark.parametrize("name", ["\ud800", "a\nb\tc\r\x00\x1b[31m", "‮abc", "👩‍👩‍👧", "e\u0301" * 500, "العربية"])
def test_hostile_names_are_drawn(name: str) -> None:
    test_names_of_any_characters_are_drawn.hypothesis.inner_test(name, name)  # type: ignore[attr-defined]


def test_the_hparams_page_is_in_the_runs_own_event_file(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    values: dict[str, int | float | str | bool] = {"arch": "resnet18", "learning_rate": 0.1, "epochs": 3, "flip": True}
    log_hparams(writer, values, {"val_acc1": 61.5, "val_loss": 1.5})
    writer.close()
    assert [each.is_file() for each in tmp_path.iterdir()] == [True], "no run of its own within the run"
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]} == {
        "final/val_acc1": 61.5,
        "final/val_loss": 1.5,
    }
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    assert {name: value.number_value or value.string_value for name, value in start.hparams.items()} == {
        "arch": "resnet18",
        "learning_rate": 0.1,
        "epochs": 3.0,
        "flip": "true",
    }
    assert metadata.SESSION_END_INFO_TAG in events.summary_metadata
    assert metadata.EXPERIMENT_TAG not in events.summary_metadata
