"""Evaluation of a language model: its files and metrics, and through a broker, a worker and the command."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import publish_classifier, publish_language_model
from rig import Bench
from samples import SHAPES, write_image_dataset, write_sentences, write_text_dataset
from shell import Shell

from services.trainer.text_evaluation import evaluate_text
from tandem.checkpoints.files import MODEL_FILE, VOCABULARY_FILE, WEIGHTS_FILE, read_verified, write_checkpoint
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.tensors import from_bytes, load_checkpoint, to_bytes
from tandem.comparison.predictions import EVALUATION_FILE
from tandem.comparison.text_evaluations import compare_text_evaluations, differing_tokens, read_text_evaluation
from tandem.comparison.token_losses import LOSSES_FILE, read_token_losses, write_token_losses
from tandem.data.corpus import load_tokens
from tandem.data.prepare.text import prepare_text
from tandem.data.vocabulary import Vocabulary
from tandem.errors import DatasetNotFound, InvalidJob, InvalidRequest, NonFiniteLoss, TandemError
from tandem.jobs.runs import list_runs
from tandem.jobs.spec import TextEvaluationJob
from tandem.volume import Volume, to_json

SIX = ("loss", "ppl", "word_ppl", "bits_per_byte")


def words_of(volume: Volume, dataset: str = "words") -> Vocabulary:
    return Vocabulary.from_json((volume.dataset(dataset) / VOCABULARY_FILE).read_bytes())


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    """A text of 20 test sentences, and models of its words."""
    volume = Volume(tmp_path_factory.mktemp("home"))
    write_text_dataset(volume, "words")
    for name in ("LSTM", "Transformer"):
        publish_language_model(volume, name.lower(), f"run-{name}", name, words=words_of(volume))
    return volume


Events = list[dict[str, Any]]


def run_evaluation(
    volume: Volume, directory: Path, stop: Callable[[], bool] = lambda: False, **values: Any
) -> tuple[dict[str, float] | None, Events]:
    """Evaluate into `directory`; return the metrics and the events."""
    events: Events = []
    directory.mkdir(exist_ok=True)
    basis = {"dataset": "words", "model": "lstm", "device": "cpu", "window": 32, "cache_window": 50}
    spec = TextEvaluationJob.model_validate({**basis, "dynamic_segment": 5, "dynamic_statistics": 500, **values})
    metrics = evaluate_text(spec, directory, volume, lambda kind, **facts: events.append({"type": kind, **facts}), stop)
    return metrics, events


def document(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "evaluation.json").read_bytes())
    return found


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_it_says_what_a_plain_loop_says(volume: Volume, tmp_path: Path, model: str) -> None:
    metrics, _ = run_evaluation(volume, tmp_path, model=model)
    located = Registry(volume).resolve(model)
    tokens = load_tokens(volume.dataset("words"), "test")
    with torch.no_grad():
        logits, _ = load_checkpoint(located.checkpoint).network(tokens[None, :-1])
    expected = -logits[0].log_softmax(1)[torch.arange(len(tokens) - 1), tokens[1:]]
    losses = read_token_losses(tmp_path / "token_losses.npy")
    assert losses.shape == (len(tokens) - 1,)
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4, atol=1e-4)
    found = document(tmp_path)
    assert found["loss"] == losses.mean(dtype=np.float64)
    assert metrics == {"loss": found["loss"], "ppl": math.exp(found["loss"])}
    text = (volume.dataset("words") / "test.txt").read_bytes()
    assert (found["num_words"], found["num_bytes"]) == (len(text.split()), len(text))
    nats = float(losses.sum(dtype=np.float64))
    assert found["word_ppl"] == pytest.approx(math.exp(nats / found["num_words"]))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["num_bytes"])
    assert (found["split"], found["mode"], found["parameters"]) == ("test", "plain", {})
    assert (found["model"], found["num_tokens"], found["num_unknown"]) == (f"{model}:1", len(tokens) - 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "token_losses.npy"]


MODES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"mode": "cache"}, {"cache_window": 50, "cache_theta": 0.3, "cache_lambda": 0.1}),
    (
        {"mode": "dynamic"},
        {
            "dynamic_rule": "rms",
            "dynamic_segment": 5,
            "dynamic_rate": 1.2e-4,
            "dynamic_decay": 8e-3,
            "dynamic_statistics": 500,
        },
    ),
    (
        {"mode": "dynamic", "dynamic_rule": "sgd", "dynamic_decay": 0.5},
        {"dynamic_rule": "sgd", "dynamic_segment": 5, "dynamic_rate": 0.1, "dynamic_decay": 0.5},
    ),
]


def test_two_models_are_compared_token_by_token(volume: Volume, tmp_path: Path) -> None:
    for name in ("lstm", "transformer"):
        run_evaluation(volume, tmp_path / name, model=name, mode="plain")
    a, b = (read_text_evaluation(tmp_path / name) for name in ("lstm", "transformer"))
    found = compare_text_evaluations(a, b)
    assert found.perplexity_a == pytest.approx(document(tmp_path / "lstm")["ppl"])
    assert found.perplexity_b == pytest.approx(document(tmp_path / "transformer")["ppl"])
    assert found.interval.low <= found.difference <= found.interval.high
    tokens = load_tokens(volume.dataset("words"), "test")
    shown = differing_tokens(a, b, volume.dataset("words"), words_of(volume), 5)
    apart = [abs(each.loss_b - each.loss_a) for each in shown]
    assert apart == sorted(apart, reverse=True)
    assert apart[0] == pytest.approx(float(np.abs(b.losses - a.losses).max()))
    for each in shown:
        assert each.token == words_of(volume).tokens[int(tokens[each.place])]
        assert each.before.split()[-1] == words_of(volume).tokens[int(tokens[each.place - 1])]
    assert differing_tokens(a, b, tmp_path / "gone", words_of(volume), 5) == []


@pytest.mark.parametrize("damage", ["gone", "cut", "no json"])
def test_an_evaluation_that_is_not_whole_is_refused(volume: Volume, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    run_evaluation(volume, run, mode="plain")
    if damage == "gone":
        (run / LOSSES_FILE).unlink()
    elif damage == "cut":
        write_token_losses(run / LOSSES_FILE, read_token_losses(run / LOSSES_FILE)[:-1])
    else:
        (run / EVALUATION_FILE).write_text("{")
    with pytest.raises(InvalidRequest, match=r"evaluation run can't be read .*: evaluate again"):
        read_text_evaluation(run)


@pytest.mark.parametrize(("values", "parameters"), MODES)
def test_a_mode_is_labelled_apart_from_the_plain_perplexity(
    volume: Volume, tmp_path: Path, values: dict[str, Any], parameters: dict[str, Any]
) -> None:
    mode, run = values["mode"], tmp_path / "mode"
    checkpoint = Registry(volume).resolve("lstm").checkpoint
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    plain, _ = run_evaluation(volume, tmp_path / "plain")
    metrics, events = run_evaluation(volume, run, **values)
    assert plain is not None
    assert metrics is not None
    assert set(metrics) == {"loss", "ppl", f"{mode}_loss", f"{mode}_ppl"}
    assert (metrics["loss"], metrics["ppl"]) == (plain["loss"], plain["ppl"])
    assert metrics[f"{mode}_loss"] < metrics["loss"], "sentences of 11 words repeat themselves"
    found = document(run)
    assert {name for name in found if name.endswith(SIX)} == {*SIX, *(f"{mode}_{name}" for name in SIX)}
    assert (found["mode"], found["parameters"]) == (mode, parameters)
    assert found[f"{mode}_loss"] == read_token_losses(run / f"{mode}_token_losses.npy").mean(dtype=np.float64)
    same = (tmp_path / "plain" / "token_losses.npy").read_bytes()
    assert (run / "token_losses.npy").read_bytes() == same
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before
    steps = [event["step"] for event in events]
    assert steps == sorted(set(steps))
    passes = {"cache": 1, "dynamic": 2}[mode] * found["num_tokens"] + parameters.get("dynamic_statistics", 0)
    assert (events[-1]["step"], events[-1]["num_steps"], events[-1]["time_left_s"]) == (passes, passes, 0.0)
    assert all(event["type"] == "progress" and event["rate"] > 0 for event in events)


def test_splits_and_a_part_of_one(volume: Volume, tmp_path: Path) -> None:
    run_evaluation(volume, tmp_path / "all", split="val")
    run_evaluation(volume, tmp_path / "part", split="valid", limit_tokens=30, window=7, num_threads=1)
    whole, part = document(tmp_path / "all"), document(tmp_path / "part")
    assert whole["split"] == part["split"] == "valid"
    assert (part["num_tokens"], part["word_ppl"], part["bits_per_byte"], part["num_bytes"]) == (29, None, None, None)
    losses = read_token_losses(tmp_path / "all" / "token_losses.npy")
    np.testing.assert_allclose(
        read_token_losses(tmp_path / "part" / "token_losses.npy"), losses[:29], rtol=1e-4, atol=1e-5
    )


def test_bits_a_byte_are_not_said_of_words_that_the_vocabulary_lacks(volume: Volume, tmp_path: Path) -> None:
    source = write_sentences(volume.home / "source" / "few.txt")
    prepare_text(volume, source, "few", max_vocabulary=8)
    publish_language_model(volume, "few", "run-few", words=words_of(volume, "few"))
    run_evaluation(volume, tmp_path, model="few", dataset="few")
    found = document(tmp_path)
    assert found["num_unknown"] > 10
    assert found["bits_per_byte"] is None
    assert found["word_ppl"] > 1
    # A text that is not that of the tokens gives no counts at all.
    (volume.dataset("few") / "test.txt").write_text("other words\n")
    run_evaluation(volume, tmp_path, model="few", dataset="few")
    assert document(tmp_path)["word_ppl"] is None


@pytest.mark.parametrize("after", [0, 2, 20])
def test_a_stop_ends_it_between_windows_and_leaves_nothing(volume: Volume, tmp_path: Path, after: int) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    metrics, _ = run_evaluation(volume, tmp_path, stop, mode="dynamic")
    assert metrics is None
    assert asked == after + 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def unfit(volume: Volume) -> Volume:
    """The volume with models and data that don't fit each other, and a model whose weights are no numbers."""
    write_image_dataset(volume, "shapes")
    publish_classifier(volume, "tiny", "run-c", classes=SHAPES)
    publish_language_model(volume, "other", "run-o")
    write_text_dataset(volume, "short")
    path = volume.dataset("short") / "dataset.json"
    manifest = json.loads(path.read_bytes())
    manifest["num_tokens"]["test"] = 1
    path.write_bytes(to_json(manifest))
    reordered = words_of(volume)
    publish_language_model(volume, "backwards", "run-b", words=Vocabulary(reordered.tokens[::-1], "words"))
    located = Registry(volume).resolve("lstm")
    files = read_verified(located.checkpoint)
    weights = {key: torch.full_like(value, float("nan")) for key, value in from_bytes(files[WEIGHTS_FILE]).items()}
    checkpoint = volume.run("run-n") / "checkpoints" / "step-00000001"
    kept = {name: files[name] for name in (MODEL_FILE, VOCABULARY_FILE)}
    write_checkpoint(checkpoint, {**kept, WEIGHTS_FILE: to_bytes(weights)})
    Registry(volume).publish("nan", "language_model", "run-n", checkpoint, {})
    return volume


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"model": "tiny"}, InvalidJob, "tiny:1 is a classifier; a text needs a language model"),
        ({"dataset": "shapes"}, InvalidJob, "--data: 'shapes' is a dataset of images; a language model needs text"),
        ({"model": "other"}, InvalidJob, "'words' numbers its .* words otherwise than other:1 does its"),
        ({"model": "backwards"}, InvalidJob, "each number would stand for another word; evaluate it on the data that"),
        ({"split": "dev"}, DatasetNotFound, r"no split 'dev' \(there: train, valid, test\)"),
        ({"split": "../tokens/test"}, DatasetNotFound, "no split"),
        ({"dataset": "short"}, InvalidJob, "test of 'short' has 1 token; a perplexity needs 2 or more"),
        ({"model": "nan"}, NonFiniteLoss, "nan:1 gives token 1 of words/test a loss that is no number; its weights"),
        (
            {"model": "transformer", "mode": "dynamic", "dynamic_rule": "sgd", "dynamic_rate": 1e30},
            NonFiniteLoss,
            "no number; the weights diverge as they follow the text: lower --dynamic-rate",
        ),
        ({"device": "cuda:63"}, InvalidRequest, "'cuda:63' is not here"),
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
    """The command on a volume with a model of the dataset's words, and a worker."""
    publish_language_model(bench.volume, "tiny", "run-a", words=words_of(bench.volume))
    bench.start_worker()
    return Shell(bench.volume.home, {"TANDEM_REDIS_URL": str(bench.url)})


def test_evaluate_as_a_person_types_it(bench: Bench, shell: Shell, tmp_path: Path) -> None:
    copy = tmp_path / "losses.npy"
    out = shell("evaluate", "tiny@latest", "--data", "words", "--mode", "cache", "--output", str(copy)).stdout
    (run_id,) = [record.run_id for record in list_runs(bench.volume, lambda: None)]
    record, run = bench.record(run_id), bench.volume.run(run_id)
    assert (record.state, record.kind, record.model_name) == ("SUCCEEDED", "evaluate_language_model", "tiny:1")
    assert record.model_version is None
    found = document(run)
    assert record.progress.step == record.progress.num_steps == found["num_tokens"]
    assert record.progress.metrics == {name: found[name] for name in ("loss", "ppl", "cache_loss", "cache_ppl")}
    assert len(Registry(bench.volume).versions("tiny")) == 1, "an evaluation publishes nothing"
    for text in (f"{found['ppl']:.2f}", f"{found['cache_loss']:.4f}", "with the cache", "window 2000, theta 0.3"):
        assert text in out
    assert f"{run_id} SUCCEEDED: tiny:1 on words" in out
    assert copy.read_bytes() == (run / "cache_token_losses.npy").read_bytes()
    for arguments in (["list"], ["show", run_id], ["watch", run_id]):
        assert f"with a cache ppl {found['cache_ppl']:.2f}" in shell("runs", *arguments).stdout
    answer = shell.json("evaluate", "run:run-a/1", "--data", "words", "--split", "valid", "--limit", "40")
    assert (answer["mode"], answer["split"], answer["num_tokens"]) == ("plain", "valid", 39)
    assert (answer["model"], answer["ppl"]) == ("run:run-a/1", pytest.approx(math.exp(answer["loss"])))
    assert len(read_token_losses(Path(answer["token_losses"]))) == 39
    assert "cache_ppl" not in answer
    (other,) = {record.run_id for record in list_runs(bench.volume, lambda: None)} - {run_id}
    same = shell.json("compare", f"run:{run_id}", f"run:{run_id}")
    assert (same["num_tokens"], same["difference"]) == (found["num_tokens"], {"value": 0.0, "interval": [0.0, 0.0]})
    assert same["a"] == {"model": "tiny:1", "mode": "cache", "loss": same["b"]["loss"], "ppl": same["b"]["ppl"]}
    assert same["a"]["ppl"] == pytest.approx(found["cache_ppl"], rel=1e-5)
    assert same["verdict"].startswith("No difference is shown between tiny:1 and tiny:1")
    assert "other splits" in shell.error("compare", f"run:{run_id}", f"run:{other}")


def test_what_the_volume_tells_is_said_before_anything_is_queued(bench: Bench, shell: Shell) -> None:
    publish_language_model(bench.volume, "other", "run-o")
    publish_classifier(bench.volume, "images", "run-c", classes=SHAPES)
    before = len(list_runs(bench.volume, lambda: None))
    assert "otherwise than other:1" in shell.error("evaluate", "other", "--data", "words")
    assert "is a dataset of images; a language model needs text" in shell.error("evaluate", "tiny", "--data", "shapes")
    assert "is a dataset of text; this job needs images" in shell.error("evaluate", "images", "--data", "words")
    assert "no split 'dev'" in shell.error("evaluate", "tiny", "--data", "words", "--split", "dev")
    assert "no model 'nothing'" in shell.error("evaluate", "nothing", "--data", "words")
    assert "--flip is for classifiers" in shell.error("evaluate", "tiny", "--data", "words", "--flip", code=2)
    assert len(list_runs(bench.volume, lambda: None)) == before
