"""Promotion as a job of the trainer: decided once, whatever happens meanwhile, and the end of a chain."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from factories import language_card, language_files, publish_classifier
from rig import Bench
from samples import write_image_dataset, write_text_dataset

from services.trainer.promotion import Promoter
from tandem.checkpoints.files import step_directory, write_checkpoint
from tandem.checkpoints.registry import Registry
from tandem.cli.promote import promote as promote_command
from tandem.cli.train import train
from tandem.comparison.predictions import PREDICTIONS_FILE, compare_predictions
from tandem.data.vocabulary import Vocabulary
from tandem.errors import Conflict, InvalidJob, Superseded
from tandem.jobs.promotion_spec import PROMOTION_FILE, PromotionJob
from tandem.volume import Volume

GATE = {"alias": "production", "alpha": 0.999, "num_threads": 1}


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    """Return a volume with data, and versions 1 to 3 of `racer` with other weights."""
    volume = Volume(tmp_path / "home")
    dataset = write_image_dataset(volume, "shapes")
    ids = [each.id for each in dataset.classes]
    for version in (1, 2, 3):
        publish_classifier(volume, "racer", f"run-{version}", seed=10 + version, classes=ids)
    return volume


def make_promoter(
    volume: Volume, model: str, stop: Callable[[], bool] = lambda: False, run: str = "gate", **values: Any
) -> Promoter:
    spec = PromotionJob.model_validate(
        {"kind": "promote_classifier", "dataset": "shapes", "model": model, **GATE, **values}
    )
    directory = volume.run(run)
    directory.mkdir(exist_ok=True)
    return Promoter(spec, directory, volume, lambda *_, **__: None, stop)


def ranked(volume: Volume) -> tuple[int, int]:
    """Return the worse and the better of versions 1 and 2."""
    Registry(volume).set_alias("racer", "production", 1, "somebody")
    promoter = make_promoter(volume, "racer:2", run="ranking", min_gain=0.9)
    assert promoter.promote() is not None
    run = promoter.run
    files = (run / "against" / PREDICTIONS_FILE, run / "candidate" / PREDICTIONS_FILE)
    table = compare_predictions(*files).summary.labelled
    assert table is not None
    assert table.accuracy_a != table.accuracy_b, "one of them is better on these images"
    return (1, 2) if table.accuracy_b > table.accuracy_a else (2, 1)


def test_a_classifier_is_promoted_by_what_both_predict_and_only_once(volume: Volume) -> None:
    worse, better = ranked(volume)
    registry = Registry(volume)
    registry.set_alias("racer", "production", worse, "somebody")
    promoter = make_promoter(volume, f"racer:{better}")
    found = promoter.promote()
    assert found is not None
    said = f"racer@production is racer:{better}: racer:{better} is better than racer:{worse}: "
    assert found.sentence.startswith(said)
    assert found.metrics["promoted"] == 1
    assert registry.aliases("racer")["production"] == better
    document = json.loads((promoter.run / PROMOTION_FILE).read_bytes())
    assert (document["promoted"], document["evidence"]["against"]) == (True, f"racer:{worse}")
    assert document["evidence"]["gain"] == found.metrics["gain"] > 0
    moved = registry.history("racer")[-1]
    assert (moved["by"], moved["to"], moved["evidence"]["on"]) == ("run gate", better, "shapes/val")
    # Killed before it could say so, and run again: somebody has moved the alias back by then.
    registry.set_alias("racer", "production", worse, "somebody")
    length = len(registry.history("racer"))
    assert promoter.promote() == found
    assert registry.aliases("racer")["production"] == worse
    assert len(registry.history("racer")) == length


def test_a_refusal_leaves_the_alias_and_is_a_line_of_the_history(volume: Volume) -> None:
    worse, better = ranked(volume)
    registry = Registry(volume)
    registry.set_alias("racer", "production", better, "somebody")
    promoter = make_promoter(volume, f"racer:{worse}")
    found = promoter.promote()
    assert found is not None
    said = f"racer@production stays where it is: racer:{worse} is no better than racer:{better}"
    assert found.sentence.startswith(said)
    assert found.metrics["promoted"] == 0
    assert promoter.promote() == found, "a second attempt decides nothing anew"
    (line,) = [entry for entry in registry.history("racer") if entry.get("by") == "run gate"]
    assert (line["kept"], line["refused"]) == (better, worse)


def test_what_takes_the_alias_meanwhile_is_what_is_to_be_beaten(volume: Volume) -> None:
    worse, better = ranked(volume)
    registry = Registry(volume)
    registry.set_alias("racer", "production", 3, "somebody")

    def moves() -> bool:
        if registry.aliases("racer")["production"] == 3:
            registry.set_alias("racer", "production", worse, "another run")
        return False

    # Version 3 has the alias when the comparison begins, and another when it ends.
    found = make_promoter(volume, f"racer:{better}", moves).promote()
    assert found is not None
    assert found.sentence.startswith(f"racer@production is racer:{better}: racer:{better} is better than racer:{worse}")
    registry.set_alias("racer", "production", 3, "somebody")
    with pytest.raises(Conflict, match=f"racer@production is racer:{worse} by now"):
        make_promoter(volume, f"racer:{better}", moves, run="named", against=f"racer:{worse}").promote()


def test_ends_without_a_comparison(volume: Volume) -> None:
    registry = Registry(volume)
    first = make_promoter(volume, "racer:1").promote()
    assert first is not None
    assert first.sentence == "racer@production is racer:1: nothing had the alias"
    again = make_promoter(volume, "racer:1", run="again").promote()
    assert again is not None
    assert again.sentence == "racer@production is racer:1: it has the alias already"
    assert make_promoter(volume, "racer:2", lambda: True, run="stopped").promote() is None
    with pytest.raises(InvalidJob, match="racer:2 is what it is to beat"):
        make_promoter(volume, "racer:2", run="itself", against="racer:2").promote()
    assert registry.aliases("racer")["production"] == 1


def test_an_attempt_that_was_superseded_moves_nothing(volume: Volume) -> None:
    promoter = make_promoter(volume, "racer:1")

    def refuse() -> Any:
        raise Superseded("attempt 2 has begun")

    stale = Promoter(promoter.spec, promoter.run, volume, promoter.report, promoter.stop, refuse)
    with pytest.raises(Superseded):
        stale.promote()
    assert "production" not in Registry(volume).aliases("racer")
    assert not (promoter.run / PROMOTION_FILE).exists()


def invoke(command: object, *arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(command, list(arguments))  # type: ignore[arg-type]
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_a_training_ends_in_production_by_itself_if_it_is_better(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(bench.volume.home))
    monkeypatch.setenv("TANDEM_REDIS_URL", str(bench.url))
    bench.start_worker()
    small = ["--data", "words", "--model", "LSTM", "--emsize", "16", "--nhid", "16", "--batch-size", "4", "--bptt", "8"]
    small += ["--num-threads", "1", "--name", "words", "--promote", "production", "--json"]

    def chain(*options: str) -> dict[str, str]:
        answer: dict[str, str] = json.loads(invoke(train, "lm", *small, *options).stdout)
        return answer

    def ended(run_id: str) -> str:
        record = bench.wait_for_state(run_id, "SUCCEEDED", "FAILED", "CANCELED")
        assert record.state == "SUCCEEDED", record.message
        return record.message

    untrained, trained = ["--epochs", "1", "--lr", "1e-6"], ["--epochs", "2", "--lr", "0.01"]
    answer = chain(*untrained)
    assert set(answer) == {"run_id", "promotion_run_id"}
    assert ended(answer["promotion_run_id"]) == "words@production is words:1: nothing had the alias"
    answer = chain(*trained, "--evaluate", "test", "--key", "nightly")
    assert bench.record(answer["promotion_run_id"]).after == (answer["run_id"], answer["evaluation_run_id"])
    assert chain(*trained, "--evaluate", "test", "--key", "nightly") == answer
    said = ended(answer["promotion_run_id"])
    assert said.startswith("words@production is words:2: words:2 is better than words:1: perplexity ")
    assert "tokens of words/test" in said
    registry = Registry(bench.volume)
    assert registry.aliases("words")["production"] == 2
    answer = chain(*untrained, "--seed", "1")
    said = ended(answer["promotion_run_id"])
    assert said.startswith("words@production stays where it is: words:3 is no better than words:2: perplexity ")
    assert bench.record(answer["promotion_run_id"]).progress.metrics["promoted"] == 0
    # The same by hand.
    gate = ["--to", "production", "--on", "words", "--split", "test"]
    result = CliRunner().invoke(promote_command, ["words:3", *gate])
    assert isinstance(result.exception, Conflict)
    assert "words@production stays where it is: words:3 is no better than words:2" in str(result.exception)
    # Of two by hand at once the later one meets what the earlier one has left.
    registry.set_alias("words", "production", 3, "somebody")
    document = json.loads(invoke(promote_command, "words:2", *gate, "--metric", "ppl", "--json").stdout)
    assert (document["promoted"], document["previous_version"]) == (True, 3)
    assert document["evidence"]["perplexity"] < document["evidence"]["perplexity_before"]
    assert registry.aliases("words")["production"] == 2


def test_language_models_are_weighed_on_the_tokens_of_the_split(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "home")
    write_text_dataset(volume, "text")
    words = Vocabulary.from_json((volume.dataset("text") / "vocabulary.json").read_bytes())
    registry = Registry(volume)
    for version in (1, 2):
        card = language_card("LSTM", len(words), f"run-{version}")
        checkpoint = step_directory(volume.run(f"run-{version}"), card.step)
        write_checkpoint(checkpoint, language_files(card, words, seed=version))
        registry.publish("lm", "language_model", f"run-{version}", checkpoint, card.metrics)
    registry.set_alias("lm", "production", 1, "somebody")
    values = {"kind": "promote_language_model", "dataset": "text", "split": "valid", "model": "lm:2"}
    spec = PromotionJob.model_validate({**values, **GATE, "alpha": 0.05})
    run = volume.run("gate")
    run.mkdir()
    found = Promoter(spec, run, volume, lambda *_, **__: None, lambda: False).promote()
    assert found is not None
    document = json.loads((run / PROMOTION_FILE).read_bytes())
    low, high = document["evidence"]["interval"]
    assert low <= document["evidence"]["gain"] <= high
    assert document["promoted"] == (low > 0)
