import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.checkpoints.files import step_directory, write_checkpoint, write_pointer
from tandem.checkpoints.references import ModelReference, RunReference, parse_reference
from tandem.checkpoints.registry import Registry, Version, describe
from tandem.errors import (
    CheckpointCorrupt,
    Conflict,
    InvalidName,
    InvalidReference,
    InvalidRequest,
    ModelNotFound,
    RunNotFound,
)
from tandem.volume import Volume
from tandem.wire.limits import MAX_ALIASES


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Volume(tmp_path))


def checkpoint(registry: Registry, run_id: str, step: int = 1) -> Path:
    path = step_directory(registry.volume.run(run_id), step)
    write_checkpoint(path, {"weights": run_id.encode()})
    return path


def publish(registry: Registry, run_id: str, val_loss: float, name: str = "m") -> int:
    path = checkpoint(registry, run_id)
    return registry.publish(name, "language_model", run_id, path, {"val_loss": val_loss}).version


def test_versions_count_up_and_aliases_follow(registry: Registry) -> None:
    assert [publish(registry, run_id, loss) for run_id, loss in (("r1", 0.5), ("r2", 0.3), ("r3", 0.4))] == [1, 2, 3]
    assert registry.aliases("m") == {"latest": 3, "best": 2}
    assert registry.names() == ["m"]
    assert [version.run_id for version in registry.versions("m")] == ["r1", "r2", "r3"]
    assert describe(registry, "m")["latest"] == 3
    history = (registry.volume.model("m") / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["alias"] for line in history] == ["latest", "best", "latest", "best", "latest"]


def test_of_classifiers_the_most_accurate_is_the_best(registry: Registry) -> None:
    for run_id, accuracy in (("r1", 0.6), ("r2", 0.9), ("r3", 0.8)):
        metrics = {"val_acc1": accuracy, "val_loss": accuracy}
        registry.publish("c", "classifier", run_id, checkpoint(registry, run_id), metrics)
    assert registry.aliases("c") == {"latest": 3, "best": 2}


def test_publishing_again_changes_nothing(registry: Registry) -> None:
    publish(registry, "r1", 0.5)
    publish(registry, "r2", 0.6)
    history = (registry.volume.model("m") / "history.jsonl").read_text()
    assert publish(registry, "r1", 0.5) == 1
    assert publish(registry, "r2", 0.6) == 2
    assert registry.aliases("m") == {"latest": 2, "best": 1}
    assert (registry.volume.model("m") / "history.jsonl").read_text() == history


def test_publishing_again_heals_aliases_that_never_moved(registry: Registry) -> None:
    publish(registry, "r1", 0.5)
    aliases = (registry.volume.model("m") / "aliases.json").read_bytes()
    publish(registry, "r2", 0.4)
    # As a kill between the version and its aliases leaves it.
    (registry.volume.model("m") / "aliases.json").write_bytes(aliases)
    assert publish(registry, "r2", 0.4) == 2
    assert registry.aliases("m") == {"latest": 2, "best": 2}


def test_references_resolve(registry: Registry) -> None:
    publish(registry, "r1", 0.3)
    publish(registry, "r2", 0.5)
    resolve = registry.resolve
    assert [resolve(text).label for text in ("m", "m@latest", "m:1", "m@best")] == ["m:2", "m:2", "m:1", "m:1"]
    assert resolve("m").digest == registry.versions("m")[1].sha256
    assert resolve("m:2").checkpoint == step_directory(registry.volume.run("r2"), 1)


def test_runs_resolve_to_their_best_then_their_latest(registry: Registry) -> None:
    first, second = checkpoint(registry, "r1", 1), checkpoint(registry, "r1", 2)
    run = registry.volume.run("r1")
    with pytest.raises(ModelNotFound, match="steps there: 1, 2"):
        registry.resolve("run:r1")
    write_pointer(run, "latest", second, {})
    assert registry.resolve("run:r1").label == "run:r1/2"
    write_pointer(run, "best", first, {})
    assert registry.resolve("run:r1").label == "run:r1/1"
    assert registry.resolve("run:r1/2").checkpoint == second
    with pytest.raises(ModelNotFound):
        registry.resolve("run:r1/9")
    with pytest.raises(RunNotFound):
        registry.resolve("run:r9")


def test_a_reference_resolves_while_a_version_is_published(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, "r1", 0.5)
    listed = registry.versions

    def versions_and_then_another(name: str) -> list[Version]:
        found = listed(name)
        monkeypatch.setattr(registry, "versions", listed)
        publish(registry, "r2", 0.4)
        return found

    monkeypatch.setattr(registry, "versions", versions_and_then_another)
    assert registry.resolve("m").label == "m:1"
    assert registry.resolve("m").label == "m:2"


def test_what_is_not_there_is_said(registry: Registry) -> None:
    with pytest.raises(ModelNotFound, match="none yet"):
        registry.resolve("m")
    publish(registry, "r1", 0.5)
    for reference, says in (("x", "there: m"), ("m:7", "no version 7"), ("m@production", "no alias 'production'")):
        with pytest.raises(ModelNotFound, match=says):
            registry.resolve(reference)


def test_a_damaged_version_file_is_refused(registry: Registry) -> None:
    publish(registry, "r1", 0.5)
    (registry.volume.model("m") / "versions" / "0001.json").write_text("{")
    with pytest.raises(CheckpointCorrupt):
        registry.resolve("m")


@pytest.mark.parametrize(
    "change",
    [{"version": "1"}, {"metrics": [1]}, {"checkpoint": None}, {"created_at": 3}, {"more": 1}, {"name": "../m"}],
)
def test_a_version_of_another_shape_is_refused(registry: Registry, change: dict[str, object]) -> None:
    publish(registry, "r1", 0.5)
    path = registry.volume.model("m") / "versions" / "0001.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(CheckpointCorrupt, match=r"0001\.json can't be read"):
        registry.versions("m")


@pytest.mark.parametrize("text", ["{", "", "[1]", '"x"', '{"latest": "1"}', '{"latest": true}', '{"best": {}}', "\xff"])
def test_damaged_aliases_are_refused(registry: Registry, text: str) -> None:
    publish(registry, "r1", 0.5)
    (registry.volume.model("m") / "aliases.json").write_text(text, "latin-1")
    with pytest.raises(CheckpointCorrupt, match=r"aliases\.json can't be read"):
        registry.resolve("m")
    assert registry.resolve("m:1").label == "m:1"


def test_directories_that_no_reference_can_name_are_passed_over(registry: Registry) -> None:
    publish(registry, "r1", 0.5)
    for name in ("two words", ".hidden", "-x"):
        shutil.copytree(registry.volume.model("m"), registry.volume.models / name)
    assert registry.names() == ["m"]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("digits", ModelReference("digits")),
        ("digits:12", ModelReference("digits", 12)),
        ("digits@best", ModelReference("digits", None, "best")),
        ("a.b-c_d", ModelReference("a.b-c_d")),
        ("run:r1", RunReference("r1")),
        ("run:r1/30", RunReference("r1", 30)),
    ],
)
def test_references_parse(text: str, parsed: ModelReference | RunReference) -> None:
    assert parse_reference(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "run", "run:", "a b", "../x", "a/b", "a:", "a:x", "a@", "a:1@b", ".a", "run:r/x", "a" * 65, "a\n"]
)
def test_other_texts_are_no_references(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse_reference(text)


@pytest.mark.parametrize("name", ["../up", "", "a/b", "-x", "ä"])
def test_names_never_become_paths_elsewhere(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidName):
        registry.volume.model(name)


def test_aliases_set_by_hand_outlive_what_is_published(registry: Registry) -> None:
    publish(registry, "r1", 0.5)
    assert registry.set_alias("m", "production", 1, "a person") is None
    publish(registry, "r2", 0.4)
    assert registry.aliases("m") == {"latest": 2, "best": 2, "production": 1}
    assert registry.resolve("m@production").label == "m:1"
    history = (registry.volume.model("m") / "history.jsonl").read_text()
    assert registry.set_alias("m", "production", 1, "another") == 1
    # What changes nothing is no history.
    assert (registry.volume.model("m") / "history.jsonl").read_text() == history
    assert registry.delete_alias("m", "production", "a person") == 1
    assert registry.aliases("m") == {"latest": 2, "best": 2}
    last = json.loads((registry.volume.model("m") / "history.jsonl").read_text().splitlines()[-1])
    assert {key: last[key] for key in ("alias", "from", "to", "by")} == {
        "alias": "production",
        "from": 1,
        "to": None,
        "by": "a person",
    }


@pytest.mark.parametrize("alias", ["latest", "best"])
def test_what_moves_by_itself_is_not_set_by_hand(registry: Registry, alias: str) -> None:
    publish(registry, "r1", 0.5)
    changes: list[Callable[[], object]] = [
        lambda: registry.set_alias("m", alias, 1, ""),
        lambda: registry.delete_alias("m", alias, ""),
    ]
    for change in changes:
        with pytest.raises(InvalidRequest, match="moves by itself") as caught:
            change()
        assert caught.value.field == "alias"
    assert registry.aliases("m") == {"latest": 1, "best": 1}


def test_aliases_are_bounded_and_need_what_they_name(registry: Registry) -> None:
    with pytest.raises(ModelNotFound):
        registry.set_alias("m", "x", 1, "")
    assert not registry.volume.model("m").exists()
    publish(registry, "r1", 0.5)
    with pytest.raises(ModelNotFound, match="no version 2"):
        registry.set_alias("m", "x", 2, "")
    for number in range(MAX_ALIASES - 2):
        registry.set_alias("m", f"a{number}", 1, "")
    with pytest.raises(Conflict, match="which is the limit"):
        registry.set_alias("m", "one-more", 1, "")
    registry.set_alias("m", "a0", 1, "")
