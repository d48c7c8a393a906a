"""Which checkpoints a run keeps: the rule, and the pins that hold against it."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.checkpoints.files import (
    list_checkpoints,
    remove_checkpoints,
    step_directory,
    verify,
    write_checkpoint,
)
from tandem.checkpoints.pins import locked_pins, pin
from tandem.checkpoints.protection import pins_in_force
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.retention import Keep, kept_steps
from tandem.errors import CheckpointCorrupt, ModelNotFound, RunNotFound
from tandem.jobs import record as machine
from tandem.jobs.record import JobRecord
from tandem.jobs.references import pin_references
from tandem.jobs.runs import mirror
from tandem.jobs.spec import make_spec
from tandem.volume import Volume

STEPS = st.sets(st.integers(0, 60))
KEEPS = st.builds(Keep, st.integers(1, 5), st.none() | st.integers(1, 4))
EPOCHS = st.integers(1, 7)


@given(STEPS, KEEPS, EPOCHS, st.none() | st.integers(0, 60), STEPS)
def test_what_is_wanted_is_kept_and_nothing_else(
    steps: set[int], keep: Keep, steps_per_epoch: int, best: int | None, pinned: set[int]
) -> None:
    kept = kept_steps(steps, keep, steps_per_epoch, best, pinned)
    newest = set(sorted(steps, reverse=True)[: keep.last])
    every = {each for each in steps if keep.every and each and each % (keep.every * steps_per_epoch) == 0}
    assert newest <= kept
    assert steps & {best, *pinned} <= kept
    assert every <= kept
    assert kept <= steps
    for step in kept - newest - every:
        assert step == best or step in pinned


@given(STEPS, KEEPS, EPOCHS, st.none() | st.integers(0, 60), STEPS)
def test_removing_at_each_save_leaves_the_same_as_removing_once(
    steps: set[int], keep: Keep, steps_per_epoch: int, best: int | None, pinned: set[int]
) -> None:
    there: set[int] = set()
    for step in sorted(steps):
        there = kept_steps(there | {step}, keep, steps_per_epoch, best, pinned)
    assert there == kept_steps(steps, keep, steps_per_epoch, best, pinned)


@given(STEPS, KEEPS, EPOCHS)
def test_to_keep_more_never_removes_more(steps: set[int], keep: Keep, steps_per_epoch: int) -> None:
    fewer = kept_steps(steps, keep, steps_per_epoch)
    assert fewer <= kept_steps(steps, replace(keep, last=keep.last + 1), steps_per_epoch)
    assert kept_steps(steps, replace(keep, every=None), steps_per_epoch) <= fewer


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path)


def checkpoint(volume: Volume, run_id: str, step: int) -> Path:
    path = step_directory(volume.run(run_id), step)
    write_checkpoint(path, {"weights": bytes(step)})
    return path


def record(volume: Volume, run_id: str) -> JobRecord:
    at = machine.now()
    made = JobRecord(run_id=run_id, kind="k", dataset="d", model_name="m", queue="cpu", submitted_at=at, updated_at=at)
    volume.run(run_id).mkdir(parents=True, exist_ok=True)
    mirror(volume, made)
    return made


def test_a_published_checkpoint_is_pinned_and_an_older_registry_needs_no_pin(volume: Volume) -> None:
    for step in (1, 2):
        Registry(volume).publish("m", "classifier", "r", checkpoint(volume, "r", step), {})
    found = pins_in_force(volume, "r")
    assert [(each.who, each.step) for each in found.in_force] == [("m:1", 1), ("m:2", 2)]
    pins = volume.run("r") / "pins"
    assert sorted(each.name for each in pins.glob("*.json")) == ["model-m-0001.json", "model-m-0002.json"]
    for path in pins.glob("*.json"):
        path.unlink()
    assert pins_in_force(volume, "r").in_force == found.in_force
    assert pins_in_force(volume, "other").in_force == ()


def test_the_pin_of_a_version_that_went_to_another_run_is_stale(volume: Volume) -> None:
    # As a kill between the pin and the version leaves it: the number is taken by another.
    pin(checkpoint(volume, "killed", 1), "model", "m:1")
    assert pins_in_force(volume, "killed").steps == {1}
    Registry(volume).publish("m", "classifier", "r", checkpoint(volume, "r", 1), {})
    found = pins_in_force(volume, "killed")
    assert (found.in_force, [each.name for each in found.stale]) == ((), ["model-m-0001.json"])


def test_a_damaged_version_is_told_and_its_pin_still_holds(volume: Volume) -> None:
    Registry(volume).publish("m", "classifier", "r", checkpoint(volume, "r", 1), {})
    path = volume.model("m") / "versions" / "0001.json"
    path.write_text("{")
    found = pins_in_force(volume, "r")
    assert found.steps == {1}
    assert found.unreadable_versions == (path,)


def test_a_run_holds_its_pins_until_it_is_over(volume: Volume) -> None:
    source = checkpoint(volume, "source", 3)
    waiting = record(volume, "waiting")
    pin(source, "run", "waiting")
    assert pins_in_force(volume, "source").steps == {3}
    running = machine.start(waiting)
    mirror(volume, running)
    assert pins_in_force(volume, "source").steps == {3}
    mirror(volume, machine.fail(running, "no"))
    found = pins_in_force(volume, "source")
    assert (found.in_force, [each.name for each in found.stale]) == ((), ["waiting.json"])


def test_a_record_that_is_not_there_yet_or_damaged_holds_and_a_run_that_is_gone_does_not(volume: Volume) -> None:
    source = checkpoint(volume, "source", 3)
    for run_id in ("submitted", "damaged", "gone"):
        record(volume, run_id)
        pin(source, "run", run_id)
    (volume.run("submitted") / "record.json").unlink()
    (volume.run("damaged") / "record.json").write_text('{"state": "SUCC')
    (volume.run("gone") / "record.json").unlink()
    shutil.rmtree(volume.run("gone"))
    found = pins_in_force(volume, "source")
    assert sorted(each.who for each in found.in_force) == ["damaged", "submitted"]
    assert [each.name for each in found.stale] == ["gone.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"checkpoint": "step-00000003", "by": "run"}',
        '{"checkpoint": "../../x", "by": "run", "who": "w"}',
        '{"checkpoint": "step-00000003", "by": "run", "who": "another"}',
        '{"checkpoint": "step-00000003", "by": "model", "who": "w"}',
        '{"checkpoint": "step-00000003", "by": "run", "who": "../w"}',
        '{"checkpoint": "step-00000003", "by": "cat", "who": "w"}',
    ],
)
def test_a_damaged_pin_is_told(volume: Volume, text: str) -> None:
    source = checkpoint(volume, "source", 3)
    record(volume, "w")
    pin(source, "run", "w")
    path = volume.run("source") / "pins" / "w.json"
    path.write_text(text)
    found = pins_in_force(volume, "source")
    assert (found.in_force, found.stale, found.unreadable) == ((), (), (path,))


def test_what_has_been_removed_can_not_be_pinned(volume: Volume) -> None:
    source = checkpoint(volume, "source", 3)
    checkpoint(volume, "source", 4)
    remove_checkpoints([source])
    with pytest.raises(ModelNotFound, match=r"run:source/3 has been removed .*steps there: 4"):
        pin(source, "run", "w")
    assert not list((volume.run("source") / "pins").glob("*.json"))
    with pytest.raises(RunNotFound, match="no run 'nobody'"):
        pin(step_directory(volume.run("nobody"), 1), "run", "w")
    assert not volume.run("nobody").exists()


def test_whoever_pins_waits_for_whoever_removes(volume: Volume) -> None:
    source = checkpoint(volume, "source", 3)
    failed: list[BaseException] = []

    def late() -> None:
        try:
            pin(source, "run", "w")
        except ModelNotFound as error:
            failed.append(error)

    thread = threading.Thread(target=late)
    with locked_pins(volume.run("source")):
        assert not pins_in_force(volume, "source").in_force
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), "the pin waits"
        remove_checkpoints([source])
    thread.join(10)
    assert len(failed) == 1


@pytest.mark.parametrize(
    ("values", "pinned"),
    [
        ({"kind": "evaluate_classifier", "model": "run:source/3"}, ["run-a"]),
        ({"kind": "evaluate_language_model", "model": "run:source/3"}, ["run-a"]),
        ({"kind": "evaluate_classifier", "model": "m:3"}, []),
        (
            {"kind": "train_classifier", "model_name": "m", "arch": "resnet18", "weights_from": "run:source/3"},
            ["run-a"],
        ),
        ({"kind": "train_classifier", "model_name": "m", "arch": "resnet18", "resume_from": "run:source/3"}, ["run-a"]),
        ({"kind": "train_language_model", "model_name": "m", "model": "LSTM"}, []),
    ],
)
def test_a_job_pins_the_checkpoints_of_runs_that_it_names(
    volume: Volume, values: dict[str, str], pinned: list[str]
) -> None:
    checkpoint(volume, "source", 3)
    record(volume, "run-a")
    pin_references(make_spec({"dataset": "d", **values}), "run-a", volume)
    found = pins_in_force(volume, "source")
    assert [each.who for each in found.in_force] == pinned
    assert all((each.by, each.step) == ("run", 3) for each in found.in_force)


def test_a_torn_checkpoint_is_not_published(volume: Volume) -> None:
    path = checkpoint(volume, "r", 4)
    (path / "weights").write_bytes(b"1234")
    with pytest.raises(CheckpointCorrupt, match="weights is altered"):
        Registry(volume).publish("m", "classifier", "r", path, {})
    assert Registry(volume).names() == []
    assert not pins_in_force(volume, "r").in_force


def test_one_that_is_gone_is_not_published(volume: Volume) -> None:
    path = checkpoint(volume, "r", 4)
    remove_checkpoints([path])
    with pytest.raises(CheckpointCorrupt, match="step-00000004 is no checkpoint"):
        Registry(volume).publish("m", "classifier", "r", path, {})
    assert list_checkpoints(volume.run("r")) == []


def test_the_digest_of_a_verified_checkpoint_is_what_the_version_holds(volume: Volume) -> None:
    path = checkpoint(volume, "r", 4)
    version = Registry(volume).publish("m", "classifier", "r", path, {})
    assert version.sha256 == verify(path)
    assert json.loads((volume.run("r") / "pins" / "model-m-0001.json").read_bytes()) == {
        "checkpoint": "step-00000004",
        "by": "model",
        "who": "m:1",
    }
