"""Saving and finding the checkpoints of a run: whole, fenced, pruned, and passed over when damaged."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from factories import classifier_card
from system_calls import WRITES, interrupted
from torch import Tensor, nn

from services.trainer.engine.optimizer_state import optimizer_tensors
from services.trainer.engine.reports import Report
from services.trainer.saver import Saver
from tandem.checkpoints.card import Card
from tandem.checkpoints.files import (
    WEIGHTS_FILE,
    list_checkpoints,
    read_pointer,
    read_verified,
    verify,
)
from tandem.checkpoints.pins import pin
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.retention import Keep
from tandem.checkpoints.room import free_bytes, room_needed
from tandem.errors import CheckpointCorrupt, Conflict, TrainingFailed, VolumeUnavailable
from tandem.volume import Volume


class FakeTraining:
    """A network of one weight, which is the step."""

    def __init__(self) -> None:
        self.network: nn.Module = nn.Linear(1, 1, bias=False)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.network.parameters())
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


def saver(run: Path, fence: type[Exception] | None = None, keep: Keep | None = None) -> Saver:
    @contextmanager
    def held() -> Iterator[None]:
        if fence is not None:
            raise fence("another attempt has begun")
        yield

    return Saver(run, card, {}, held, keep=keep or Keep())


def spoil(run: Path, step: int, name: str = WEIGHTS_FILE) -> None:
    path = run / "checkpoints" / f"step-{step:08d}" / name
    path.write_bytes(path.read_bytes()[:-1])


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    training = FakeTraining()
    for step in (1, 2, 3, 4, 5):
        saver(tmp_path).save(training.advance(step), {"val_acc1": 1.0}, is_best=step == 2)
    assert steps(tmp_path) == [2, 4, 5]
    assert read_pointer(tmp_path, "latest") == tmp_path / "checkpoints" / "step-00000005"
    other = FakeTraining()
    assert saver(tmp_path).load_best(other.network)[0].name == "step-00000002"
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
        saver(tmp_path).load_best(FakeTraining().network)


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
        Saver(tmp_path, other, {}, nullcontext).resume(FakeTraining())


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(), [3, 5, 6]),
        (Keep(1), [3, 6]),
        (Keep(4), [3, 4, 5, 6]),
        # Two steps an epoch.
        (Keep(1, every=1), [2, 3, 4, 6]),
        (Keep(1, every=2), [3, 4, 6]),
        (Keep(2, every=9), [3, 5, 6]),
    ],
)
def test_a_run_keeps_what_it_was_told_to(tmp_path: Path, keep: Keep, kept: list[int]) -> None:
    mine = saver(tmp_path, keep=keep)
    for step in (1, 2, 3, 4, 5, 6):
        mine.save(FakeTraining().advance(step), {"val_acc1": 1.0}, is_best=step == 3)
    assert steps(tmp_path) == kept


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the directory of a run that is not alone on its volume."""
    run = Volume(tmp_path).run("r")
    run.mkdir(parents=True)
    return run


def test_what_is_pinned_stays_until_nobody_needs_it(run: Path) -> None:
    volume = Volume(run.parent.parent)
    mine = saver(run, keep=Keep(1))
    first, second = (mine.save(FakeTraining().advance(1), {}), mine.save(FakeTraining().advance(1), {}))
    assert first == second
    Registry(volume).publish("m", "classifier", "r", first, {})
    other = volume.run("other")
    other.mkdir()
    pin(mine.save(FakeTraining().advance(2), {}), "run", "other")
    for step in (3, 4):
        mine.save(FakeTraining().advance(step), {})
    assert steps(run) == [1, 2, 4]
    other.rmdir()
    mine.save(FakeTraining().advance(5), {})
    mine.save(FakeTraining().advance(6), {})
    assert steps(run) == [1, 6]
    assert sorted(path.name for path in (run / "pins").glob("*.json")) == ["model-m-0001.json"]


def test_a_damaged_pin_keeps_everything_and_is_told_once(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = saver(run, keep=Keep(1))
    mine.save(FakeTraining().advance(1), {})
    (run / "pins" / "someone.json").write_text('{"checkpoint": "step-0')
    for step in (2, 3, 4):
        mine.save(FakeTraining().advance(step), {})
    assert steps(run) == [1, 2, 3, 4]
    told = [each for each in caplog.messages if "someone.json can't be read" in each]
    assert len(told) == 1, caplog.messages
    (run / "pins" / "someone.json").unlink()
    mine.save(FakeTraining().advance(5), {})
    assert steps(run) == [5]


def evaluated(run: Path, *accuracies: float) -> Saver:
    """Save a checkpoint of each epoch, of two steps; the best is the first of the most accurate."""
    mine = saver(run, keep=Keep(9))
    for number, accuracy in enumerate(accuracies, 1):
        training = FakeTraining().advance(2 * number)
        training.finished_epochs = number
        mine.save(training, {"val_acc1": accuracy}, is_best=accuracy > max(accuracies[: number - 1], default=-1.0))
    return mine


@pytest.mark.parametrize("text", [None, "", "{", '{"checkpoint": "step-00000099"}', '{"checkpoint": "step-00000002"}'])
@pytest.mark.parametrize("name", ["best", "latest"])
def test_pointers_are_mended_when_an_attempt_begins(tmp_path: Path, name: str, text: str | None) -> None:
    evaluated(tmp_path, 1.0, 3.0, 3.0, 2.0)
    path = tmp_path / f"{name}.json"
    before = path.read_bytes()
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert saver(tmp_path).resume(FakeTraining()) is not None
    assert path.read_bytes() == before


def test_a_best_pointer_lost_while_training_costs_no_checkpoint(tmp_path: Path) -> None:
    evaluated(tmp_path, 1.0, 3.0, 2.0)
    (tmp_path / "best.json").write_text("{")
    saver(tmp_path, keep=Keep(1)).save(FakeTraining().advance(8), {})
    assert steps(tmp_path) == [4, 8]


def test_without_a_whole_checkpoint_the_pointers_go(tmp_path: Path) -> None:
    evaluated(tmp_path, 1.0)
    spoil(tmp_path, 2)
    assert saver(tmp_path).resume(FakeTraining()) is None
    assert not (tmp_path / "best.json").exists()
    assert not (tmp_path / "latest.json").exists()


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "model.json", "trainer_state.safetensors", "manifest.json"])
def test_a_damaged_best_gives_its_place_to_the_next_best(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    mine = evaluated(tmp_path, 1.0, 4.0, 2.0, 3.0, 2.0)
    spoil(tmp_path, 4, name)
    training = FakeTraining()
    checkpoint, card = mine.load_best(training.network)
    assert (checkpoint.name, training.weight(), card.metrics) == ("step-00000008", 8.0, {"val_acc1": 3.0})
    assert read_pointer(tmp_path, "best") == checkpoint
    assert "the next best takes its place" in caplog.text
    assert name in caplog.text


def test_with_all_of_them_damaged_there_is_no_best(tmp_path: Path) -> None:
    mine = evaluated(tmp_path, 1.0, 2.0)
    for step in (2, 4):
        spoil(tmp_path, step)
    with pytest.raises(CheckpointCorrupt, match="no best checkpoint that is whole"):
        mine.load_best(FakeTraining().network)


def test_damaged_checkpoints_make_no_good_one_go(tmp_path: Path) -> None:
    mine = evaluated(tmp_path, 1.0, 2.0, 3.0)
    for step in (4, 6):
        spoil(tmp_path, step)
    mine = saver(tmp_path)
    card = mine.resume(FakeTraining())
    assert card is not None
    assert card.step == 2
    mine.save(FakeTraining().advance(7), {})
    assert steps(tmp_path) == [2, 7]


def test_one_that_stood_aside_for_a_save_that_was_killed_comes_back(tmp_path: Path) -> None:
    checkpoint = saver(tmp_path).save(FakeTraining().advance(2), {})
    for number in (3, 4):
        saver(tmp_path).save(FakeTraining().advance(number), {})
    assert not checkpoint.exists()
    newest = list_checkpoints(tmp_path)[-1]
    newest.rename(newest.with_name(f".old-{newest.name}"))
    torn = newest.with_name(".old-step-00000009")
    torn.mkdir()
    (torn / "manifest.json").write_text("{")
    mine = saver(tmp_path)
    mine.begin()
    assert steps(tmp_path) == [3, 4]
    assert verify(newest)
    assert not list((tmp_path / "checkpoints").glob(".*"))


class Room:
    """A volume of so many bytes, less what the checkpoints of a run take."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run = run
        self.total = 10**9
        monkeypatch.setattr("services.trainer.pruner.free_bytes", self.free)

    def free(self, _: Path) -> int:
        taken = sum(path.stat().st_blocks * 512 for path in (self._run / "checkpoints").rglob("*") if path.is_file())
        return self.total - taken

    def leave(self, num_bytes: int) -> None:
        """Have `num_bytes` free as things are now."""
        self.total += num_bytes - self.free(self._run)


def size_of(checkpoint: Path) -> int:
    return sum(len(data) for data in read_verified(checkpoint).values())


def test_without_room_nothing_is_written_or_removed_and_the_line_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = evaluated(tmp_path, 2.0, 1.0)
    room = Room(tmp_path, monkeypatch)
    room.leave(500_000)
    leftover = tmp_path / "checkpoints" / ".tmp-step-00000003"
    leftover.mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(VolumeUnavailable) as caught:
        mine.save(FakeTraining().advance(5), {})
    assert str(caught.value) == (
        f"a checkpoint of 0.0 MB needs 1.1 MB; {tmp_path} has 0.5 MB free: make room, or keep fewer with --keep-last"
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not leftover.exists()


def test_what_would_go_after_a_save_goes_before_it_where_room_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = evaluated(tmp_path, 1.0, 2.0, 1.0, 1.0)
    tight = saver(tmp_path, keep=Keep(2))
    room = Room(tmp_path, monkeypatch)
    # Each of them takes some blocks: without one of them it is just enough.
    room.leave(room_needed(size_of(list_checkpoints(tmp_path)[0])) + 100 - 4096)
    with pytest.raises(VolumeUnavailable):
        mine.save(FakeTraining().advance(9), {})
    assert steps(tmp_path) == [2, 4, 6, 8], "this one keeps nine"
    tight.save(FakeTraining().advance(9), {})
    assert steps(tmp_path) == [4, 8, 9]


def test_the_last_good_one_never_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = saver(tmp_path, keep=Keep(1))
    mine.save(FakeTraining().advance(1), {})
    room = Room(tmp_path, monkeypatch)
    room.leave(100)
    with pytest.raises(VolumeUnavailable, match=r"0\.0 MB free: make room$"):
        mine.save(FakeTraining().advance(2), {})
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("has_stepped", [False, True])
def test_room_is_looked_for_before_the_first_step(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], has_stepped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = BigTraining(optimizer)
    if has_stepped:
        training.step_once()
    mine = saver(tmp_path)
    room = Room(tmp_path, monkeypatch)
    moments = 2 if optimizer is torch.optim.AdamW else 0
    num_bytes = (1 + moments) * 4 * 300_000
    room.leave(room_needed(num_bytes) - 20_000)
    with pytest.raises(VolumeUnavailable, match=rf"a checkpoint of {num_bytes / 1e6:.1f} MB needs"):
        mine.check_room(training)
    room.leave(room_needed(num_bytes) + 20_000)
    mine.check_room(training)
    training.step_once()
    saved = size_of(mine.save(training.advance(1), {}))
    assert abs(saved - num_bytes) < 20_000, "what was foreseen is what was written"


class BigTraining(FakeTraining):
    """A network of 300,000 weights, whose optimizer's state is part of the snapshot."""

    def __init__(self, optimizer: type[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network = nn.Linear(3000, 100, bias=False)
        self.optimizer = optimizer(self.network.parameters(), lr=0.1)  # type: ignore[call-arg]

    def step_once(self) -> None:
        self.network(torch.ones(1, 3000)).sum().backward()
        self.optimizer.step()

    def snapshot(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self.network)


def test_room_is_that_of_this_user_on_the_volume(tmp_path: Path) -> None:
    before = free_bytes(tmp_path)
    assert before > 0
    with pytest.raises(FileNotFoundError):
        free_bytes(tmp_path / "nowhere")


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def save_at(run: Path, step: int, at: int) -> int:
    """Save, with system call number `at` finding the volume full (0: none); return how many there were."""
    mine = saver(run)
    training = FakeTraining().advance(step)
    training.finished_epochs = step // 2
    with interrupted(no_space, at, is_death=False, names=WRITES) as calls:
        mine.save(training, {"val_acc1": float(step)}, is_best=True)
    # To make a directory that is there already is no failure.
    assert not at or calls.last == "mkdir"
    return calls.count


@pytest.mark.parametrize("step", [4, 6], ids=["saved again", "new"])
def test_a_volume_that_fills_up_in_the_middle_leaves_nothing_half(tmp_path: Path, step: int) -> None:
    def prepared(name: str) -> Path:
        run = tmp_path / name
        run.mkdir()
        mine = saver(run)
        for each in (2, 4):
            mine.save(FakeTraining().advance(each), {"val_acc1": 1.0}, is_best=each == 2)
        return run

    num_calls = save_at(prepared("calm"), step, 0)
    assert num_calls > 15
    told: list[str] = []
    for at in range(1, num_calls + 1):
        run = prepared(f"full-{at}")
        try:
            save_at(run, step, at)
        except VolumeUnavailable as error:
            told.append(str(error))
        assert not list((run / "checkpoints").glob(".tmp-*")), at
        assert not [path.name for path in run.iterdir() if path.name.startswith(".")], at
        for checkpoint in list_checkpoints(run):
            verify(checkpoint)
        assert steps(run)[-1] >= 4, at
        assert read_pointer(run, "latest") in list_checkpoints(run)
        resumed = FakeTraining()
        mine = saver(run)
        mine.begin()
        assert mine.resume(resumed) is not None
        assert resumed.step >= 4, at
        save_at(run, step, 0)
        assert tree(run) == tree(tmp_path / "calm"), at
    assert len(told) >= num_calls - 2
    assert all("No space left" in each and "\n" not in each for each in told)


def tree(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
