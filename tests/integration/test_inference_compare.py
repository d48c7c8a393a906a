"""Compare and CompareDataset against a real server."""

from pathlib import Path

import pytest
import torch
from factories import CLASS_IDS, png, publish_classifier
from inference_server import BROKEN_PLACES, start_server
from waiting import PATIENCE_S

from tandem.client import Client, Comparison, ComparisonProgress, Image
from tandem.errors import DatasetNotFound, InvalidRequest
from tandem.models.devices import resolve_precision
from tandem.volume import Volume

pytest_plugins = ["inference_fixtures"]


def test_a_model_agrees_with_itself_at_any_batch_size(client: Client) -> None:
    images = [png(number) for number in range(70)]
    together = client.compare("three:1", "three:2", images)
    assert (together.summary.a.version, together.summary.b.version) == (1, 2)
    assert (together.summary.num_images, together.summary.num_disagreements) == (70, 0)
    assert all(result.a == result.b for result in together.results)
    # Against another, so that rounding that depends on the batch has answers to change.
    mixed = client.compare("three:1", "a", images).results
    for count in (1, 2, 33):
        parts = [client.compare("three:2", "a", images[first : first + count]) for first in range(0, 70, count)]
        assert tuple(result for part in parts for result in part.results) == mixed, f"batches of {count} differ"


@pytest.mark.skipif(
    resolve_precision("auto", torch.device("cpu")) != "bfloat16", reason="this CPU has no bfloat16 instructions"
)
def test_a_comparison_is_in_float32_where_predictions_are_not(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    publish_classifier(volume, "three", "run-three", seed=2, classes=CLASS_IDS[:3], arch="shufflenet_v2_x0_5")
    images, answers = [png(number) for number in range(8)], []
    for precision in ("float32", "bfloat16"):
        server = start_server(tmp_path / precision, volume, TANDEM_ENGINE="eager", TANDEM_PRECISION=precision)
        try:
            with Client(server.address) as client:
                client.wait_until_serving("three", timeout_s=PATIENCE_S)
                answers.append(client.compare("three", "three", images))
                assert client.classify("three", images).model.dtype == precision
                runtime = client.get_model("three").runtime
                assert runtime is not None
                assert (runtime.max_probability_drift > 0) == (precision == "bfloat16")
        finally:
            server.kill()
    assert answers[0].results == answers[1].results
    assert answers[1].summary.a.dtype == answers[1].summary.b.dtype == "float32"


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
    # What is found are just the images on which an inline comparison disagrees, with the same answers.
    images = {place: Image(png(place), "x", CLASS_IDS[place % 5]) for place in range(70) if place not in BROKEN_PLACES}
    inline = dict(zip(images, client.compare("a", "b", list(images.values())).results, strict=True))
    different = {
        f"val/{CLASS_IDS[place % 5]}/val_{place}.png": each for place, each in inline.items() if not each.agree
    }
    assert 0 < len(different) < 68
    assert {each.name: (each.a, each.b) for each in answer.disagreements} == {
        name: (each.a, each.b) for name, each in different.items()
    }


def test_a_dataset_with_itself_and_a_limit(client: Client) -> None:
    *_, answer = client.compare_dataset("three", "three:1", "shapes", limit=20)
    assert isinstance(answer, Comparison)
    assert (answer.summary.num_images, answer.summary.num_disagreements) == (19, 0)
    # Of every 3.5 images one: the broken one at 3 is among them, that at 40 is not.
    assert [result.name for result in answer.failures] == [f"val/{CLASS_IDS[3]}/val_3.png"]


def test_the_images_that_differ_most_come_back_as_they_lie(client: Client) -> None:
    *steps, answer = client.compare_dataset("a", "b", "shapes", num_returned_images=20)
    assert all(isinstance(step, ComparisonProgress) for step in steps)
    assert isinstance(answer, Comparison)
    assert len(answer.disagreements) > 20
    expected = {pair.name: png(int(pair.name.split("_")[1].removesuffix(".png"))) for pair in answer.ranked[:20]}
    assert answer.images == expected
    assert list(answer.images) == list(expected)
    *_, without = client.compare_dataset("a", "b", "shapes")
    assert isinstance(without, Comparison)
    assert without.images == {}
    assert without.results == answer.results


def test_wrong_requests(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="LSTM:1 is a language model") as caught:
        client.compare("a", "LSTM", [png(0)])
    assert caught.value.field == "model_b"
    with pytest.raises(InvalidRequest, match="no model reference") as caught:
        client.compare("a", "../b", [png(0)])
    assert caught.value.field == "model_b"
    for number in (-1, 501):
        with pytest.raises(InvalidRequest, match="1 to 500, or 0 for none") as caught:
            list(client.compare_dataset("a", "b", "shapes", num_returned_images=number))
        assert caught.value.field == "num_returned_images"
    for dataset, split in (("nope", "val"), ("shapes", "test")):
        with pytest.raises(DatasetNotFound):
            list(client.compare_dataset("a", "b", dataset, split))
    for dataset, split in (("../x", "val"), ("shapes", "../val")):
        with pytest.raises(InvalidRequest):
            list(client.compare_dataset("a", "b", dataset, split))


def test_the_evidence_of_a_dataset(client: Client) -> None:
    answer = list(client.compare_dataset("a", "b", "shapes"))[-1]
    assert isinstance(answer, Comparison)
    evidence = answer.summary.evidence
    assert evidence is not None
    assert (evidence.num_images, evidence.num_disagreements) == (68, len(answer.disagreements))
    found = evidence.labelled
    assert found is not None
    assert found.table == answer.summary.labelled
    assert sum(each.table.num_examples for each in found.by_class) == 68
    assert found.interval.low <= found.difference <= found.interval.high
    assert found.a.top_1.value == found.table.accuracy_a <= found.a.top_5.value == 1.0, "there are five classes"
    assert [each.divergence for each in answer.ranked] == sorted(
        (each.divergence for each in answer.disagreements), reverse=True
    )


def test_images_in_several_messages_are_weighed_together(client: Client) -> None:
    images = [Image(png(number), f"{number}.png", (*CLASS_IDS[:4], "unknown")[number % 5]) for number in range(300)]
    whole = client.compare("a", "three", images)
    evidence = whole.summary.evidence
    assert evidence is not None
    assert evidence.num_images == 300
    assert evidence.labelled is not None
    assert evidence.labelled.table == whole.summary.labelled
    assert evidence.labelled.table.num_examples == 240
    assert evidence.only_in_a == CLASS_IDS[3:]
    parts = [client.compare("a", "three", images[first:end]).summary.evidence for first, end in ((0, 256), (256, 300))]
    assert evidence.num_disagreements == sum(part.num_disagreements for part in parts if part)
    assert client.compare("a", "three", images, top_k=2).summary.evidence is None, "which tells no accuracy@5"


def test_models_without_a_common_class_are_refused(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    publish_classifier(volume, "animals", "run-1", classes=("cat", "dog"), arch="shufflenet_v2_x0_5")
    publish_classifier(volume, "plants", "run-2", classes=("oak", "ash"), arch="shufflenet_v2_x0_5")
    server = start_server(tmp_path, volume, TANDEM_ENGINE="eager")
    try:
        with Client(server.address) as client, pytest.raises(InvalidRequest, match="know no class in common") as caught:
            client.compare("animals", "plants", [png(0)])
        assert caught.value.field == "model_b"
    finally:
        server.kill()
