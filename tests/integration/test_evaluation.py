"""Evaluation of a checkpoint: against the same written plainly, and through a broker, a worker and the command."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import break_weights, publish_classifier, publish_language_model
from rig import Bench
from samples import SHAPES, write_image_dataset, write_text_dataset
from shell import Shell

from services.trainer.evaluation import evaluate
from tandem.checkpoints.card import ClassifierCard
from tandem.checkpoints.files import MODEL_FILE, WEIGHTS_FILE, read_verified, step_directory, write_checkpoint
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.tensors import from_bytes, load_checkpoint, to_bytes
from tandem.comparison.predictions import Header, Prediction, read_predictions
from tandem.data.images import decode_image, normalise, resize_and_crop
from tandem.errors import DatasetNotFound, InvalidJob, NonFiniteLoss, TandemError
from tandem.jobs.runs import list_runs
from tandem.jobs.spec import EvaluationJob
from tandem.volume import Volume

NUM_VAL = 15
REVERSED = SHAPES[::-1]


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    """Fifteen val images of three classes, and models that order the classes as the dataset does, and backwards."""
    volume = Volume(tmp_path_factory.mktemp("home"))
    write_image_dataset(volume, "shapes")
    publish_classifier(volume, "same", "run-a", classes=SHAPES)
    publish_classifier(volume, "reversed", "run-b", classes=("extra", *REVERSED), seed=1)
    return volume


Events = list[dict[str, Any]]


def run_evaluation(
    volume: Volume, directory: Path, stop: Callable[[], bool] = lambda: False, **values: Any
) -> tuple[dict[str, float] | None, Events]:
    """Evaluate into `directory`; return the metrics and the events."""
    events: Events = []
    basis = {"dataset": "shapes", "model": "same", "batch_size": 4, "device": "cpu"}
    spec = EvaluationJob.model_validate({**basis, **values})
    metrics = evaluate(spec, directory, volume, lambda kind, **facts: events.append({"type": kind, **facts}), stop)
    return metrics, events


def results(directory: Path) -> tuple[Header, list[Prediction], dict[str, Any]]:
    header, rows = read_predictions(directory / "predictions.jsonl")
    return header, list(rows), json.loads((directory / "evaluation.json").read_bytes())


def plain_probabilities(volume: Volume, model: str, files: list[str], mirror: bool = False) -> torch.Tensor:
    """Return probabilities (N, C), one image at a time, as one would write it without this project."""
    located = Registry(volume).resolve(model)
    checkpoint = load_checkpoint(located.checkpoint, located.digest)
    assert isinstance(checkpoint.card, ClassifierCard)
    transform, rows = checkpoint.card.preprocessing, []
    for file in files:
        pixels = decode_image((volume.dataset("shapes") / file).read_bytes())
        image = normalise(resize_and_crop(pixels[None], transform), transform)
        rows.append(checkpoint.network(image.flip(-1) if mirror else image).softmax(1)[0])
    return torch.stack(rows)


@pytest.mark.parametrize(("model", "classes"), [("same", SHAPES), ("reversed", ("extra", *REVERSED))])
def test_it_says_what_a_plain_loop_says_whatever_the_order_of_the_classes(
    volume: Volume, tmp_path: Path, model: str, classes: tuple[str, ...]
) -> None:
    metrics, _ = run_evaluation(volume, tmp_path, model=model, flip=True)
    header, rows, document = results(tmp_path)
    assert [row.file.split("/")[1] for row in rows] == [row.label for row in rows], "a class is its folder"
    files, labels = [row.file for row in rows], torch.tensor([classes.index(row.label) for row in rows])
    plain = plain_probabilities(volume, model, files)
    best = plain.topk(len(classes), dim=1)
    assert [[classes[each] for each in row] for row in best.indices.tolist()] == [
        [each.id for each in row.top_k] for row in rows
    ]
    scores = np.array([[each.probability for each in row.top_k] for row in rows])
    np.testing.assert_allclose(scores, best.values.numpy(), rtol=1e-4, atol=1e-6)
    assert document["acc1"] == pytest.approx(100 * float((best.indices[:, 0] == labels).double().mean()))
    assert document["acc5"] == 100.0, "of three or four classes"
    chosen = plain[torch.arange(NUM_VAL), labels]
    assert document["loss"] == pytest.approx(float(-chosen.log().mean()), rel=1e-4)
    mean = (plain + plain_probabilities(volume, model, files, mirror=True)) / 2
    assert document["flip"]["loss"] == pytest.approx(float(-mean[torch.arange(NUM_VAL), labels].log().mean()), rel=1e-4)
    assert document["flip"]["acc1"] == pytest.approx(100 * float((mean.argmax(1) == labels).double().mean()))
    assert metrics is not None
    assert metrics["flip_loss"] == document["flip"]["loss"] != document["loss"] == metrics["loss"]
    assert set(metrics) == {f"{prefix}{name}" for prefix in ("", "flip_") for name in ("acc1", "acc5", "loss", "ece")}
    assert (header.model, header.num_images, header.precision) == (f"{model}:1", NUM_VAL, "float32")
    assert [each.id for each in header.classes] == list(classes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "predictions.jsonl"]


def test_its_parts_add_up(volume: Volume, tmp_path: Path) -> None:
    run_evaluation(volume, tmp_path, model="reversed")
    _, rows, document = results(tmp_path)
    assert document["flip"] is None
    per_class = document["per_class"]
    assert sorted(each["id"] for each in per_class) == sorted(SHAPES), "a class without images has no accuracy"
    assert [each["num_images"] for each in per_class] == [5, 5, 5]
    assert np.mean([each["acc1"] for each in per_class]) == pytest.approx(document["acc1"])
    table = document["reliability"]
    assert sum(each["num_images"] for each in table) == NUM_VAL
    right = np.mean([row.top_k[0].id == row.label for row in rows])
    assert sum(each["num_images"] * each["accuracy"] for each in table) / NUM_VAL == pytest.approx(right)
    gaps = [each["num_images"] * abs(each["accuracy"] - each["confidence"]) for each in table]
    assert document["ece"] == pytest.approx(sum(gaps) / NUM_VAL)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_predictions_don_t_depend_on_the_batch(volume: Volume, tmp_path: Path, batch_size: int) -> None:
    for name, size in (("a", 4), ("b", batch_size)):
        (tmp_path / name).mkdir()
        run_evaluation(volume, tmp_path / name, batch_size=size)
    (_, a, _), (_, b, _) = results(tmp_path / "a"), results(tmp_path / "b")
    assert [(row.file, [each.id for each in row.top_k]) for row in a] == [
        (row.file, [each.id for each in row.top_k]) for row in b
    ]


def test_a_part_of_the_split_and_of_the_classes(volume: Volume, tmp_path: Path) -> None:
    run_evaluation(volume, tmp_path, limit_images=6, top_k=2, model="run:run-a/1")
    header, rows, document = results(tmp_path)
    assert (header.model, header.run_id, header.step, header.num_images) == ("run:run-a/1", "run-a", 1, 6)
    assert [row.label for row in rows] == [each for each in SHAPES for _ in range(2)]
    assert all(len(row.top_k) == 2 for row in rows)
    assert (document["num_images"], document["acc5"]) == (6, 100.0)


@pytest.mark.parametrize(("flip", "num_batches"), [(False, 4), (True, 8)])
def test_progress_counts_the_batches_of_all_passes(
    volume: Volume, tmp_path: Path, flip: bool, num_batches: int
) -> None:
    _, events = run_evaluation(volume, tmp_path, flip=flip)
    assert {event["type"] for event in events} == {"progress"}
    steps = [event["step"] for event in events]
    assert steps == sorted(set(steps))
    last = events[-1]
    assert (last["step"], last["num_steps"], last["time_left_s"]) == (num_batches, num_batches, 0.0)
    assert all(event["rate"] > 0 and event["time_left_s"] >= 0 for event in events)


@pytest.mark.parametrize("after", [0, 2, 6])
def test_a_stop_ends_it_between_batches_and_leaves_nothing(volume: Volume, tmp_path: Path, after: int) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    metrics, _ = run_evaluation(volume, tmp_path, stop, flip=True)
    assert metrics is None
    assert asked == after + 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def unfit(volume: Volume) -> Volume:
    """The volume with models and data that don't fit each other, and a model whose weights are no numbers."""
    write_text_dataset(volume, "text")
    publish_language_model(volume, "words", "run-l")
    publish_classifier(volume, "other", "run-o", classes=("circle", "cross", "triangle"))
    version = publish_classifier(volume, "nan", "run-n", classes=SHAPES)
    files = read_verified(volume.home / version.checkpoint, (MODEL_FILE, WEIGHTS_FILE))
    weights = {key: torch.full_like(value, float("nan")) for key, value in from_bytes(files[WEIGHTS_FILE]).items()}
    checkpoint = step_directory(volume.run("run-n"), 2)
    write_checkpoint(checkpoint, {MODEL_FILE: files[MODEL_FILE], WEIGHTS_FILE: to_bytes(weights)})
    Registry(volume).publish("nan", "classifier", "run-n", checkpoint, {})
    return volume


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"model": "other"}, InvalidJob, r"other:1 does not know the class 'square' of dataset 'shapes' \(1 of 3"),
        ({"model": "words"}, InvalidJob, "words:1 is a language model"),
        ({"dataset": "text"}, InvalidJob, "'text' is a dataset of text; this job needs images"),
        ({"split": "test"}, DatasetNotFound, r"no images in a split 'test' \(there: train, val\)"),
        ({"split": "../index/val"}, DatasetNotFound, "no images in a split"),
        ({"model": "nan"}, NonFiniteLoss, r"nan:2 gives val/circle/\S+ a loss that is no number \(15 of 15 images\)"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    unfit: Volume, tmp_path: Path, values: dict[str, Any], error: type[TandemError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        run_evaluation(unfit, tmp_path, **values)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def shell(bench: Bench) -> Shell:
    """The command on a volume with a model of the dataset's classes, and a worker."""
    publish_classifier(bench.volume, "tiny", "run-a", classes=SHAPES)
    publish_classifier(bench.volume, "tiny", "run-b", classes=REVERSED, seed=1)
    bench.start_worker()
    return Shell(bench.volume.home, {"TANDEM_REDIS_URL": str(bench.url)})


def test_evaluate_as_a_person_types_it(bench: Bench, shell: Shell, tmp_path: Path) -> None:
    out = shell("evaluate", "tiny:1", "--data", "shapes", "--flip", "--batch-size", "4").stdout
    (run_id,) = [record.run_id for record in list_runs(bench.volume, lambda: None)]
    record = bench.record(run_id)
    assert (record.state, record.kind, record.model_name) == ("SUCCEEDED", "evaluate_classifier", "tiny:1")
    assert record.model_version is None
    assert record.progress.step == record.progress.num_steps == 8
    assert len(Registry(bench.volume).versions("tiny")) == 2, "an evaluation publishes nothing"
    document = json.loads((bench.volume.run(run_id) / "evaluation.json").read_bytes())
    assert record.progress.metrics["acc1"] == document["acc1"]
    for text in (f"{document['acc1']:.2f} %", f"{document['loss']:.4f}", "worst classes", "with mirror images"):
        assert text in out
    assert str(bench.volume.run(run_id) / "predictions.jsonl") in out
    assert f"{run_id} SUCCEEDED: tiny:1 on shapes" in out
    for arguments in (["list"], ["show", run_id], ["watch", run_id]):
        assert f"acc@1 {document['acc1']:.2f} %" in shell("runs", *arguments).stdout
    assert shell.json("runs", "show", run_id)["metrics"]["flip_acc1"] == document["flip"]["acc1"]


def test_two_evaluations_are_compared_without_a_server(bench: Bench, shell: Shell, tmp_path: Path) -> None:
    first = shell.json("evaluate", "tiny:1", "--data", "shapes")
    second = shell.json("evaluate", "tiny@latest", "--data", "shapes", "--output", str(tmp_path / "b.jsonl"))
    assert (first["model"], second["model"]) == ("tiny:1", "tiny:2"), "an alias is what it was at submit"
    assert second["predictions"] == str(tmp_path / "b.jsonl")
    found = shell.json("compare", first["predictions"], f"run:{second['run_id']}")
    assert found == shell.json("compare", f"run:{first['run_id']}", str(tmp_path / "b.jsonl"))
    assert (found["num_images"], found["num_errors"], found["errors"]) == (NUM_VAL, 0, [])
    assert 0 < found["num_disagreements"] == len(found["disagreements"])
    assert found["a"]["accuracy"] == pytest.approx(first["acc1"] / 100)
    assert found["b"]["accuracy"] == pytest.approx(second["acc1"] / 100)
    assert (found["a"]["name"], found["a"]["version"], found["b"]["version"]) == ("tiny", 1, 2)
    assert found["mcnemar"]["num_labelled"] == NUM_VAL
    assert "McNemar p = " in shell("compare", first["predictions"], second["predictions"]).stdout
    assert "'tiny' is no predictions file" in shell.error("compare", first["predictions"], "tiny")
    other = shell.json("evaluate", "tiny:1", "--data", "shapes", "--split", "train")
    assert "other splits: val and train" in shell.error("compare", first["predictions"], other["predictions"])


def test_a_run_that_can_not_be_evaluated_is_one_line(bench: Bench, shell: Shell) -> None:
    break_weights(bench.volume, publish_classifier(bench.volume, "broken", "run-broken", classes=sorted(SHAPES)))
    last = shell("evaluate", "broken", "--data", "shapes", code=1).stderr.splitlines()[-1]
    assert last.startswith("tandem: run ")
    assert re.search(r"FAILED: .*model\.safetensors", last)
    found = shell.json("evaluate", "tiny", "--data", "shapes", "--no-follow")
    assert set(found) == {"run_id"}
    assert bench.wait_for_state(found["run_id"], "SUCCEEDED", "FAILED").state == "SUCCEEDED"
    # What the volume already tells is said before anything is queued.
    publish_classifier(bench.volume, "other", "run-o", classes=("circle", "cross", "triangle"))
    before = len(list_runs(bench.volume, lambda: None))
    assert "other:1 does not know the class 'square'" in shell.error("evaluate", "other", "--data", "shapes")
    assert "no dataset 'nothing'" in shell.error("evaluate", "tiny", "--data", "nothing")
    assert "no model 'nothing'" in shell.error("evaluate", "nothing", "--data", "shapes")
    assert "is a dataset of text" in shell.error("evaluate", "tiny", "--data", "words")
    assert "split 'test'" in shell.error("evaluate", "tiny", "--data", "shapes", "--split", "test")
    assert len(list_runs(bench.volume, lambda: None)) == before
