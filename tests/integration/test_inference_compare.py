"""Compare and CompareDataset against a real server."""

import pytest
from factories import CLASS_IDS, png
from inference_server import BROKEN_PLACES

from tandem.client import Client, Comparison, ComparisonProgress, Image
from tandem.errors import DatasetNotFound, InvalidRequest

pytest_plugins = ["inference_fixtures"]


@pytest.mark.parametrize("count", [1, 2, 33, 70])
def test_a_model_agrees_with_itself_at_any_batch_size(client: Client, count: int) -> None:
    answer = client.compare("three", "three:1", [png(number) for number in range(count)])
    assert answer.summary.num_images == count
    assert answer.summary.num_disagreements == 0
    assert all(result.a == result.b for result in answer.results)


def test_classes_are_matched_by_id(client: Client) -> None:
    images = [Image(png(number), f"{number}.png", CLASS_IDS[number % 5]) for number in range(20)]
    answer = client.compare("a", "b", images)
    for number, result in enumerate(answer.results):
        first = client.classify("a", [png(number)]).results[0].top_k[0].id
        second = client.classify("b", [png(number)]).results[0].top_k[0].id
        assert result.agree == (first == second)
    table = answer.summary.labelled
    assert table is not None
    assert table.num_examples == 20
    right_a = sum(result.a[0].id == result.label for result in answer.results)
    assert table.accuracy_a == right_a / 20


def test_what_can_not_be_known_is_left_out(client: Client) -> None:
    assert client.compare("a", "b", [png(0)]).summary.labelled is None
    foreign = client.compare("a", "b", [Image(png(0), label="elsewhere")])
    assert foreign.summary.labelled is None
    answer = client.compare("a", "b", [png(0), b"junk"])
    assert (answer.summary.num_images, answer.summary.num_errors) == (1, 1)
    assert len(answer.failures) == 1


def test_a_dataset_with_progress(client: Client) -> None:
    steps = list(client.compare_dataset("a", "b", "shapes"))
    assert all(isinstance(step, ComparisonProgress) for step in steps[:-1])
    assert steps[0] == ComparisonProgress(0, 70)
    answer = steps[-1]
    assert isinstance(answer, Comparison)
    assert answer.summary.num_images == 68
    assert {result.name for result in answer.failures} == {
        f"val/{CLASS_IDS[place % 5]}/val_{place}.png" for place in BROKEN_PLACES
    }
    assert answer.summary.num_disagreements == len(answer.disagreements)
    assert answer.summary.labelled is not None
    assert answer.summary.labelled.num_examples == 68
    inline = client.compare("a", "b", [Image(png(5), "x", CLASS_IDS[0])]).results[0]
    if not inline.agree:
        (same,) = [each for each in answer.disagreements if each.name.endswith("/val_5.png")]
        assert (same.a, same.b) == (inline.a, inline.b)


def test_a_dataset_with_itself_and_a_limit(client: Client) -> None:
    *_, answer = client.compare_dataset("three", "three", "shapes", limit=10)
    assert isinstance(answer, Comparison)
    assert (answer.summary.num_images, answer.summary.num_disagreements) == (9, 0)


def test_wrong_requests(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="LSTM:1 is a language model") as caught:
        client.compare("a", "LSTM", [png(0)])
    assert caught.value.field == "model_b"
    for dataset, split in (("nope", "val"), ("shapes", "test")):
        with pytest.raises(DatasetNotFound):
            list(client.compare_dataset("a", "b", dataset, split))
    for dataset, split in (("../x", "val"), ("shapes", "../val")):
        with pytest.raises(InvalidRequest):
            list(client.compare_dataset("a", "b", dataset, split))
