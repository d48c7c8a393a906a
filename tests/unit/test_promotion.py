"""The gate in front of an alias, what the history says of it, and the way back."""

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.checkpoints.files import step_directory, write_checkpoint
from tandem.checkpoints.promotion import (
    Gate,
    carry_out,
    decide,
    decide_on_texts,
    opponent,
    roll_back,
    without_comparison,
)
from tandem.checkpoints.registry import Registry
from tandem.comparison.evidence import Evidence, Interval, Labelled, Share, Standing
from tandem.comparison.intervals import difference_interval, share_interval
from tandem.comparison.paired import PairedTable
from tandem.comparison.results import ComparisonSummary, ModelVersion
from tandem.comparison.token_differences import TokenComparison
from tandem.errors import Conflict, InvalidJob, InvalidRequest, ModelNotFound, TandemError
from tandem.jobs.spec import make_spec
from tandem.volume import Volume

A = ModelVersion("m", 1, "r1", 1, "resnet18", "float32")
B = replace(A, version=2)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(Volume(tmp_path))
    for number in range(1, 5):
        checkpoint = step_directory(registry.volume.run(f"r{number}"), 1)
        write_checkpoint(checkpoint, {"weights": str(number).encode()})
        registry.publish("m", "classifier", f"r{number}", checkpoint, {"val_acc1": 0.5})
    return registry


def summary(table: PairedTable | None) -> ComparisonSummary:
    found = None
    if table is not None:
        share = Share(table.accuracy_a, share_interval(1, 2))
        standing = Standing(share, share, 0.1)
        found = Labelled(table, standing, standing, difference_interval(table), ())
    num_images = table.num_examples if table else 9
    return ComparisonSummary(A, B, num_images, 3, 0, table, Evidence(num_images, 3, 0.5, 0.1, found))


@pytest.mark.parametrize(
    ("table", "gate", "passes", "said"),
    [
        (PairedTable(500, 10, 60, 100), Gate(), True, "m:2 is better than m:1: +7.46 points on 670 images of d/val"),
        (PairedTable(500, 60, 10, 100), Gate(), False, "m:2 is no better than m:1: -7.46 points"),
        (PairedTable(500, 10, 10, 100), Gate(), False, "is no better than"),
        (PairedTable(500, 10, 14, 100), Gate(), False, "no evidence at alpha 0.05: +0.64 points"),
        (PairedTable(500, 10, 14, 100), Gate(alpha=0.5), True, "is better"),
        (PairedTable(500, 10, 60, 100), Gate(min_gain=0.1), False, "the gain is below 10 points: +7.46"),
        (PairedTable(0, 0, 1, 0), Gate(), False, "no evidence"),
    ],
)
def test_the_gate(table: PairedTable, gate: Gate, passes: bool, said: str) -> None:
    decision = decide(summary(table), gate, "d/val")
    assert (decision.passes, said in decision.reason) == (passes, True), decision.reason
    assert decision.evidence["mid_p"] == table.mid_p
    assert decision.evidence["against"] == "m:1"


@pytest.mark.parametrize(
    ("loss_b", "interval", "gate", "passes", "said"),
    [
        (3.9, (-0.15, -0.05), Gate(), True, "m:2 is better than m:1: perplexity 49.40 against 54.60 on 900 tokens"),
        (4.1, (0.05, 0.15), Gate(), False, "m:2 is no better than m:1: "),
        (4.0, (-0.05, 0.05), Gate(), False, "m:2 is no better than m:1: "),
        (3.9, (-0.25, 0.05), Gate(alpha=0.01), False, "no evidence at alpha 0.01: "),
        (3.9, (-0.15, -0.05), Gate(min_gain=0.2), False, "the gain is below 20 %: "),
    ],
)
def test_the_gate_of_language_models(
    loss_b: float, interval: tuple[float, float], gate: Gate, passes: bool, said: str
) -> None:
    found = TokenComparison(900, 4.0, loss_b, Interval(*interval), 22)
    decision = decide_on_texts(found, "m:2", "m:1", gate, "text/test")
    assert (decision.passes, said in decision.reason) == (passes, True), decision.reason
    assert decision.evidence["gain"] == pytest.approx(1 - math.exp(loss_b - 4.0))
    assert decision.evidence["against"] == "m:1"


def test_from_a_short_text_nothing_follows() -> None:
    for high in (math.inf, math.nan):
        found = TokenComparison(30, 4.0, 3.0, Interval(-math.inf, high), 4)
        with pytest.raises(Conflict, match=r"text/test has 30 tokens, from which nothing follows: take a longer text"):
            decide_on_texts(found, "m:2", "m:1", Gate(), "text/test")


def test_ends_without_a_comparison() -> None:
    assert without_comparison(2, 1, None) is None
    assert without_comparison(2, 2, "m:1") is None
    for before, reason in ((None, "nothing had the alias"), (2, "it has the alias already")):
        decision = without_comparison(2, before, None)
        assert decision is not None
        assert (decision.passes, decision.reason) == (True, reason)
    assert opponent("m", "production", "m@production") is None
    assert opponent("m", "production", "m@best") == "m@best"


def test_a_decision_for_who_has_the_alias_is_a_line_too(registry: Registry) -> None:
    registry.set_alias("m", "production", 2, "somebody")
    decision = decide(summary(PairedTable(500, 10, 60, 100)), Gate(), "d/val")
    carry_out(registry, "m", "production", 2, 2, decision, "me")
    line = registry.history("m")[-1]
    assert (line["kept"], line["by"], "refused" in line) == (2, "me", False)
    assert line["evidence"]["reason"] == decision.reason
    assert registry.aliases("m")["production"] == 2


def test_without_labels_nothing_is_decided() -> None:
    with pytest.raises(Conflict, match="d/val has no labelled image"):
        decide(summary(None), Gate(), "d/val")


@pytest.mark.parametrize("values", [{"alpha": 0.0}, {"alpha": 1.0}, {"min_gain": 1.5}, {"min_gain": float("nan")}])
def test_a_gate_that_makes_no_sense(values: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Gate(**values)


def test_the_history_says_what_was_decided_and_why(registry: Registry) -> None:
    registry.set_alias("m", "production", 1, "somebody")
    good, bad = (
        decide(summary(table), Gate(), "d/val")
        for table in (PairedTable(500, 10, 60, 100), PairedTable(500, 60, 10, 100))
    )
    carry_out(registry, "m", "production", 2, 1, bad, "me")
    assert registry.aliases("m")["production"] == 1
    carry_out(registry, "m", "production", 2, 1, good, "me")
    assert registry.aliases("m")["production"] == 2
    refused, moved = registry.history("m")[-2:]
    assert (refused["kept"], refused["refused"], refused["by"]) == (1, 2, "me")
    assert refused["evidence"]["reason"] == bad.reason
    assert (moved["from"], moved["to"], moved["by"], moved["evidence"]["mid_p"]) == (1, 2, "me", good.evidence["mid_p"])


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(registry: Registry) -> None:
    registry.set_alias("m", "production", 1, "somebody")
    decision = decide(summary(PairedTable(500, 10, 60, 100)), Gate(), "d/val")
    outcomes: list[TandemError | int] = []

    def promote(version: int) -> None:
        try:
            carry_out(registry, "m", "production", version, 1, decision, "me")
            outcomes.append(version)
        except Conflict as error:
            outcomes.append(error)

    threads = [threading.Thread(target=promote, args=(version,)) for version in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [each for each in outcomes if isinstance(each, int)]
    assert registry.aliases("m")["production"] == winner
    losers = [each for each in outcomes if isinstance(each, Conflict)]
    assert len(losers) == 2
    assert all(f"m@production is m:{winner} by now" in str(each) for each in losers)
    with pytest.raises(Conflict, match=f"m@production is m:{winner} by now"):
        registry.set_alias("m", "production", 1, "me", expected=None)
    registry.delete_alias("m", "production", "me")
    with pytest.raises(Conflict, match="m@production is gone by now"):
        registry.set_alias("m", "production", 1, "me", expected=winner)


def test_the_way_back_is_step_by_step(registry: Registry) -> None:
    for version in (1, 2, 4):
        registry.set_alias("m", "production", version, "me")
    assert roll_back(registry, "m", "production", "me") == (4, 2)
    assert roll_back(registry, "m", "production", "me") == (2, 1)
    with pytest.raises(ModelNotFound, match="m@production has been nowhere before m:1"):
        roll_back(registry, "m", "production", "me")
    registry.set_alias("m", "production", 3, "me")
    assert roll_back(registry, "m", "production", "me") == (3, 1)
    assert [entry.get("rollback") for entry in registry.history("m") if entry.get("alias") == "production"] == [
        *(None,) * 3,
        True,
        True,
        None,
        True,
    ]
    for name, alias in (("m", "absent"), ("absent", "production")):
        with pytest.raises(ModelNotFound):
            roll_back(registry, name, alias, "me")


def test_a_line_of_the_history_that_was_cut_short_is_passed_over(registry: Registry) -> None:
    registry.set_alias("m", "production", 1, "me")
    path = registry.volume.model("m") / "history.jsonl"
    path.write_text(path.read_text() + '{"alias": "prod')
    assert registry.history("m")[-1]["alias"] == "production"
    # The next one begins a line of its own.
    registry.set_alias("m", "other", 2, "me")
    assert registry.history("m")[-1]["alias"] == "other"
    path.write_text(path.read_text() + '{"alias": "prod')
    # The alias moved, and its line was lost with the machine.
    aliases = registry.volume.model("m") / "aliases.json"
    aliases.write_text(json.dumps({**registry.aliases("m"), "production": 3}))
    assert registry.aliases("m")["production"] == 3
    assert roll_back(registry, "m", "production", "me") == (3, 1)
    assert registry.history("nobody") == []


def test_a_level_that_a_bootstrap_can_not_tell_is_refused_for_language_models() -> None:
    values = {"model": "m:1", "alias": "production", "dataset": "d", "alpha": 0.001}
    assert make_spec({"kind": "promote_classifier", **values}).kind == "promote_classifier"
    with pytest.raises(InvalidJob, match=r"finer than a bootstrap can tell: 0\.002 or above"):
        make_spec({"kind": "promote_language_model", **values})
