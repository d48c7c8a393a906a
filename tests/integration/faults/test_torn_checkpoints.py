"""Checkpoints torn in every way: an attempt goes on from the newest whole one and ends in the same bytes.

No torn one is served or published. The run is a real one, of a tiny language model; it is stopped once, and each case
goes on from a copy of what was there.
"""

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from factories import language_card, vocabulary
from system_calls import REMOVALS, WRITES, Killed, interrupted

from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.reports import EpochDone, StepDone
from services.trainer.saver import TRAINER_STATE_FILE, Saver
from tandem.checkpoints.card import Card
from tandem.checkpoints.files import (
    MANIFEST_FILE,
    MODEL_FILE,
    NETWORK_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    list_checkpoints,
    manifest_digest,
    read_pointer,
    read_verified,
    step_directory,
    step_of,
)
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.retention import Keep
from tandem.checkpoints.tensors import load_checkpoint
from tandem.errors import CheckpointCorrupt, TandemError
from tandem.jobs.spec import LanguageModelJob
from tandem.models.language_models import LanguageModelShape, build_language_model
from tandem.volume import Volume

WORDS = vocabulary()
SPEC = LanguageModelJob.model_validate(
    {"dataset": "d", "model_name": "m", "model": "LSTM", "epochs": 4, "batch_size": 2, "bptt": 8, "num_layers": 1}
    | {"embedding_size": 8, "hidden_size": 8, "precision": "float32", "learning_rate": 0.01, "schedule": "constant"}
)
SAVE_EACH = 2
# Of four epochs of six steps each the second is the best: what is read later is the text backwards.
BEST, LAST = 12, 24
STOP_AT = NEWEST = 20
BEFORE = 18
FILES = (WEIGHTS_FILE, MODEL_FILE, VOCABULARY_FILE, NETWORK_FILE, TRAINER_STATE_FILE, MANIFEST_FILE)
SERVED = (WEIGHTS_FILE, MODEL_FILE, VOCABULARY_FILE, MANIFEST_FILE)


def new_training() -> LanguageModelTraining:
    shape = LanguageModelShape(SPEC.model, len(WORDS), 8, 8, 1, 2, SPEC.dropout, SPEC.tied, 16)
    torch.manual_seed(0)
    tokens = (torch.arange(96) * 3 + torch.arange(96) // 7) % len(WORDS)
    return LanguageModelTraining(SPEC, build_language_model(shape), tokens, tokens[:40].flip(0), torch.device("cpu"))


def make_card(epoch: int, step: int, metrics: dict[str, float]) -> Card:
    shape = {"embedding_size": 8, "hidden_size": 8, "num_layers": 1, "dropout": SPEC.dropout, "context_length": 16}
    return language_card("LSTM", len(WORDS), "r", epoch=epoch, step=step, metrics=metrics, **shape)


def new_saver(run: Path) -> Saver:
    return Saver(run, make_card, {VOCABULARY_FILE: WORDS.to_json(), NETWORK_FILE: b"[]"}, nullcontext, keep=Keep(3))


def attempt(run: Path, stop_at: int | None = None) -> int:
    """Go on with the run, to its end or to `stop_at`; return the step that it went on from."""
    training, saver = new_training(), new_saver(run)
    saver.begin()
    saver.resume(training)
    first = training.step
    for report in training.fit():
        if isinstance(report, EpochDone):
            saver.save(training, report.metrics, is_best=report.improved)
        elif isinstance(report, StepDone) and training.step % SAVE_EACH == 0:
            saver.save(training, training.running_metrics())
        if training.step == stop_at and isinstance(report, StepDone):
            break
    return first


def tree(run: Path) -> dict[str, bytes]:
    """Return every file of the run directory by its path, locks aside."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@dataclass(frozen=True)
class Runs:
    """One run never interrupted, and the same one stopped at STOP_AT; copies of that are what is broken."""

    home: Path
    end: dict[str, bytes]

    def copy(self, name: str) -> Path:
        run = Volume(self.home / name).run("r")
        shutil.copytree(Volume(self.home / "stopped").run("r"), run)
        return run


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    # It is processes that are killed here, not machines; on a busy disk the fsyncs took half of the 76 s.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    home = tmp_path_factory.mktemp("runs")
    undisturbed, stopped = (Volume(home / name).run("r") for name in ("undisturbed", "stopped"))
    for run in (undisturbed, stopped):
        run.mkdir(parents=True)
    attempt(undisturbed)
    attempt(stopped, STOP_AT)
    assert [step_of(each) for each in list_checkpoints(stopped)] == [BEST, 16, BEFORE, NEWEST]
    assert read_pointer(undisturbed, "latest") == step_directory(undisturbed, LAST)
    assert read_pointer(undisturbed, "best") == step_directory(undisturbed, BEST)
    assert read_pointer(stopped, "best") == step_directory(stopped, BEST)
    return Runs(home, tree(undisturbed))


@pytest.fixture
def run(runs: Runs, request: pytest.FixtureRequest) -> Iterator[Path]:
    run = runs.copy(f"case-{abs(hash(request.node.nodeid))}")
    yield run
    shutil.rmtree(run.parent.parent)


def flipped(data: bytes, place: int) -> bytes:
    bit = random.Random(f"{place} {len(data)}").randrange(8)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


TEARS: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "cut to 0 bytes": lambda data: data[:0],
    "cut to 1 byte": lambda data: data[:1],
    "cut at half": lambda data: data[: len(data) // 2],
    "cut before its last byte": lambda data: data[:-1],
    "a byte appended": lambda data: data + b"\0",
    "a bit of its first byte flipped": lambda data: flipped(data, 0),
    "a bit of its middle byte flipped": lambda data: flipped(data, len(data) // 2),
    "a bit of its last byte flipped": lambda data: flipped(data, len(data) - 1),
}


def tear(path: Path, how: str) -> None:
    torn = TEARS[how](path.read_bytes())
    path.unlink()
    if torn is not None:
        path.write_bytes(torn)


def other_version(checkpoint: Path) -> None:
    document = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
    (checkpoint / MANIFEST_FILE).write_text(json.dumps({**document, "format_version": 2}) + "\n")


def other_hash(checkpoint: Path) -> None:
    document = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
    document["files"][WEIGHTS_FILE]["sha256"] = hashlib.sha256(b"others").hexdigest()
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(document) + "\n")


def emptied(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def manifest(text: str) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        (checkpoint / MANIFEST_FILE).write_text(text)

    return write


BROKEN: dict[str, Callable[[Path], None]] = {
    "manifest not JSON": manifest("no manifest\n"),
    "manifest a list": manifest("[]\n"),
    "manifest without files": manifest('{"format_version": 1, "files": {}}\n'),
    "manifest with an entry that is none": manifest('{"format_version": 1, "files": {"model.json": 3}}\n'),
    "manifest of another format version": other_version,
    "manifest with one hash altered": other_hash,
    "directory empty": emptied,
}
BROKEN |= {f"{name}: {how}": lambda path, name=name, how=how: tear(path / name, how) for name in FILES for how in TEARS}  # type: ignore[misc]


def kind_of(how: str) -> str:
    """Return the class of a fault: its file aside."""
    name, _, tear = how.rpartition(": ")
    return f"a file: {tear}" if name else tear


@pytest.mark.parametrize("how", BROKEN)
def test_a_torn_newest_checkpoint_is_passed_over(run: Path, runs: Runs, how: str, tried: "Counter[str]") -> None:
    tried[f"newest checkpoint, {kind_of(how)}"] += 1
    BROKEN[how](step_directory(run, NEWEST))
    assert attempt(run) == BEFORE
    assert tree(run) == runs.end


@pytest.mark.parametrize("how", BROKEN)
def test_a_torn_checkpoint_is_neither_published_nor_served(run: Path, how: str, tried: "Counter[str]") -> None:
    tried[f"published checkpoint, {kind_of(how)}"] += 1
    checkpoint, volume = step_directory(run, BEST), Volume(run.parent.parent)
    digest = manifest_digest(checkpoint)
    Registry(volume).publish("before", "language_model", "r", checkpoint, {})
    BROKEN[how](checkpoint)
    torn = how.partition(":")[0]
    is_served = torn not in FILES or torn in SERVED
    named = torn if torn in FILES else checkpoint.name
    if is_served:
        with pytest.raises(CheckpointCorrupt, match=named):
            load_checkpoint(checkpoint, digest)
    with pytest.raises(CheckpointCorrupt, match=named):
        read_verified(checkpoint, digest=digest)
    with pytest.raises(CheckpointCorrupt, match=named):
        Registry(volume).publish("m", "language_model", "r", checkpoint, {})
    assert Registry(volume).names() == ["before"]


@pytest.mark.parametrize("how", BROKEN)
def test_a_torn_best_checkpoint_gives_its_place_to_the_best_whole_one(
    run: Path, how: str, tried: "Counter[str]"
) -> None:
    tried[f"best checkpoint, {kind_of(how)}"] += 1
    BROKEN[how](step_directory(run, BEST))
    attempt(run)
    checkpoint, card = new_saver(run).load_best(new_training().network)
    # Of the epochs whose checkpoints were still there; without the second nobody would have kept it.
    assert checkpoint == read_pointer(run, "best") == step_directory(run, BEFORE)
    assert "val_loss" in card.metrics
    version = Registry(Volume(run.parent.parent)).publish("m", "language_model", "r", checkpoint, card.metrics)
    assert load_checkpoint(checkpoint, version.sha256).card == card


@pytest.mark.parametrize("how", ["missing", "cut to 0 bytes", "cut at half", "leading nowhere", "leading elsewhere"])
@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_torn_pointer_is_mended(run: Path, runs: Runs, name: str, how: str, tried: "Counter[str]") -> None:
    tried[f"pointer {name}.json, {how}"] += 1
    path = run / f"{name}.json"
    if how in TEARS:
        tear(path, how)
    else:
        there = "../../../else" if how == "leading elsewhere" else "step-00000099"
        path.write_text(json.dumps({"checkpoint": there, "step": 99, "metrics": {}}))
    assert attempt(run) == NEWEST
    assert tree(run) == runs.end


@pytest.mark.parametrize("name", ["latest", "best"])
def test_readers_refuse_a_torn_pointer_with_a_line(run: Path, name: str, tried: "Counter[str]") -> None:
    tried[f"pointer {name}.json, read by a reference"] += 1
    registry = Registry(Volume(run.parent.parent))
    assert registry.resolve("run:r").label == f"run:r/{BEST}"
    (run / "best.json").unlink()
    (run / f"{name}.json").write_text("{")
    with pytest.raises(TandemError, match=rf"{name}\.json can't be read"):
        registry.resolve("run:r")


def killed_save(run: Path, at: int) -> int:
    """Go on to the next save, and be killed before its system call number `at` (0: not at all).

    Returns how many there were.
    """
    training, saver = new_training(), new_saver(run)
    saver.begin()
    saver.resume(training)
    for report in training.fit():
        if isinstance(report, EpochDone):
            metrics, is_best = dict(report.metrics), report.improved
            break
        if isinstance(report, StepDone) and training.step % SAVE_EACH == 0:
            metrics, is_best = training.running_metrics(), False
            break
    with interrupted(Killed, at, is_death=True, names=(*WRITES, *REMOVALS)) as calls:
        saver.save(training, metrics, is_best)
    return calls.count


@pytest.mark.parametrize("stop_at", [BEST, STOP_AT], ids=["saved again as the best", "new"])
def test_a_save_killed_between_any_two_system_calls_costs_nothing(
    runs: Runs, stop_at: int, tried: "Counter[str]", request: pytest.FixtureRequest
) -> None:
    # At the last step of an epoch a checkpoint is saved before it is evaluated, and then again.
    kind = request.node.callspec.id
    stopped = Volume(runs.home / kind).run("r")
    stopped.mkdir(parents=True)
    attempt(stopped, stop_at)

    def prepared(name: str) -> Path:
        run = Volume(runs.home / f"{kind}, {name}").run("r")
        shutil.copytree(stopped, run)
        return run

    count = killed_save(prepared("calm"), 0)
    assert count > 30
    for at in range(1, count + 1):
        run = prepared(f"killed at {at}")
        with pytest.raises(Killed):
            killed_save(run, at)
        tried[f"kill in a save, {kind}"] += 1
        assert attempt(run) >= stop_at, at
        assert tree(run) == runs.end, at
        shutil.rmtree(run.parent.parent)
