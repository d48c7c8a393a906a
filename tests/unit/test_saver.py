"""Saving and finding the checkpoints of a run: whole, fenced, pruned, and passed over when damaged."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from factories import classifier_card
from torch import Tensor, nn

from services.trainer.engine.reports import Report
from services.trainer.saver import Saver, load_best
from tandem.checkpoints.card import Card
from tandem.checkpoints.files import WEIGHTS_FILE, list_checkpoints, read_pointer
from tandem.errors import CheckpointCorrupt, Conflict, TrainingFailed


class FakeTraining:
    """A network of one weight, which is the step."""

    def __init__(self) -> None:
        self.network: nn.Module = nn.Linear(1, 1, bias=False)
        self.step = 0
        self.steps_per_epoch = 2
        self.finished_epochs = 0

    @property
    def served_network(self) -> nn.Module:
        return self.network

    def advance(self, step: int) -> "FakeTraining":
        self.step = step
        with torch.no_grad():
            next(self.network.parameters()).fill_(step)
        return self

    def weight(self) -> float:
        return float(next(self.network.parameters()).detach())

    def fit(self) -> Iterator[Report]:
        yield from ()

    def running_metrics(self) -> dict[str, float]:
        return {}

    def forget_best(self) -> None:
        pass

    def snapshot(self) -> dict[str, Tensor]:
        return {"position": torch.tensor([self.step])}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.step = int(tensors["position"][0])


def card(epoch: int, step: int, metrics: dict[str, float]) -> Card:
    return classifier_card(step=step).model_copy(update={"epoch": epoch, "metrics": metrics})


def saver(run: Path, fence: type[Exception] | None = None) -> Saver:
    def check() -> None:
        if fence is not None:
            raise fence("another attempt has begun")

    return Saver(run, card, {}, check)


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    training = FakeTraining()
    for step in (1, 2, 3, 4, 5):
        saver(tmp_path).save(training.advance(step), {"val_acc1": 1.0}, is_best=step == 2)
    assert steps(tmp_path) == [2, 4, 5]
    assert read_pointer(tmp_path, "latest") == tmp_path / "checkpoints" / "step-00000005"
    other = FakeTraining()
    assert load_best(tmp_path, other.network).name == "step-00000002"
    assert other.weight() == 2.0


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    training = FakeTraining()
    for step in (1, 2):
        saver(tmp_path).save(training.advance(step), {})
    path = tmp_path / "checkpoints" / "step-00000002" / ("manifest.json" if damage == "manifest" else WEIGHTS_FILE)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage in ("truncate", "manifest") else data)
    resumed = FakeTraining()
    card = saver(tmp_path).resume(resumed)
    assert card is not None
    assert card.step == 1
    assert (resumed.step, resumed.weight()) == (1, 1.0)


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert saver(tmp_path).resume(FakeTraining()) is None
    with pytest.raises(CheckpointCorrupt, match="no best checkpoint"):
        load_best(tmp_path, FakeTraining().network)


def test_an_attempt_that_is_over_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Conflict):
        saver(tmp_path, fence=Conflict).save(FakeTraining().advance(1), {})
    assert steps(tmp_path) == []
    assert read_pointer(tmp_path, "latest") is None


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path) -> None:
    training = FakeTraining().advance(3)
    saver(tmp_path).save(training, {"val_acc1": 1.0})
    training.finished_epochs = 1
    saver(tmp_path).save(training, {"val_acc1": 2.0})
    assert steps(tmp_path) == [3]
    assert '"val_acc1": 2.0' in (tmp_path / "checkpoints" / "step-00000003" / "model.json").read_text()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_what_a_killed_save_left_behind_is_removed_by_the_next(tmp_path: Path) -> None:
    saver(tmp_path).save(FakeTraining().advance(1), {})
    (tmp_path / "checkpoints" / ".tmp-step-00000002").mkdir()
    (tmp_path / "checkpoints" / ".old-step-00000001").mkdir()
    saver(tmp_path).save(FakeTraining().advance(2), {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    saver(tmp_path).save(FakeTraining().advance(1), {})

    def other(epoch: int, step: int, metrics: dict[str, float]) -> Card:
        return card(epoch, step, metrics).model_copy(update={"dataset_fingerprint": "1" * 64})

    with pytest.raises(TrainingFailed, match="has been replaced since this run began"):
        Saver(tmp_path, other, {}, lambda: None).resume(FakeTraining())
