"""What `tandem bench train` is made of: timer, bare step, turns, groups of devices, and the checks of its options."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from services.trainer.bench import device_group, write_made_up
from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.speed import PARTS, BareStep, PartTimer, Turn, measure, ratio_of
from tandem.checkpoints.card import Preprocessing
from tandem.cli.bench import bench
from tandem.data.manifest import ImageDataset, read_dataset, read_index
from tandem.data.splits import PackedSplit
from tandem.errors import InvalidRequest
from tandem.jobs.spec import ClassifierJob
from tandem.models.weights import bare_state
from tandem.volume import Volume

SIDE = 16
BASIS = {"model_name": "m", "arch": "squeezenet1_1", "device": "cpu", "batch_size": 8, "image_size": SIDE}


def clock(*seconds: float) -> Iterator[float]:
    """Return times that are `seconds` apart."""
    now = 0.0
    for each in (0.0, *seconds):
        now += each
        yield now


def test_parts_of_a_step_sum_to_the_whole() -> None:
    #             data  forward  gap  backward  gap  update  end
    times = clock(2.0, 3.0, 0.25, 4.0, 0.25, 0.5, 0.0)
    timer = PartTimer(lambda: next(times))
    with timer.step():
        for part in ("forward", "backward", "update"):
            with timer.part(part):
                pass
    shares = timer.shares()
    assert tuple(shares) == PARTS
    assert {part: 10 * share for part, share in shares.items()} == pytest.approx(
        {"data": 2.0, "forward": 3.0, "backward": 4.0, "update": 0.5, "communication": 0.0, "other": 0.5}
    )
    exchanging = timer.shares(communication_s=1.0)
    assert (10 * exchanging["backward"], 10 * exchanging["communication"]) == pytest.approx((3.0, 1.0))
    assert sum(exchanging.values()) == pytest.approx(1.0)


def test_data_is_waited_for_once_a_step_however_many_parts_the_batch_is_cut_into() -> None:
    times = clock(1.0, 1.0, 5.0, 1.0, 0.0)
    timer = PartTimer(lambda: next(times))
    with timer.step():
        for _ in range(2):
            with timer.part("forward"):
                pass
    assert timer.shares()["data"] == pytest.approx(1 / 8)
    assert timer.shares()["other"] == pytest.approx(5 / 8)


def test_communication_is_no_more_than_backward_and_no_less_than_nothing() -> None:
    times = clock(1.0, 1.0, 0.0)
    timer = PartTimer(lambda: next(times))
    with timer.step(), timer.part("backward"):
        pass
    assert timer.shares(9.0)["communication"] == pytest.approx(0.5)
    assert timer.shares(-9.0)["communication"] == 0.0


def test_the_ratio_counts_a_smaller_last_batch_as_what_it_is() -> None:
    assert ratio_of(Turn(num_steps=2, num_images=16, seconds=4.0, bare_s=4.0), batch_size=8) == 1.0
    assert ratio_of(Turn(num_steps=2, num_images=12, seconds=3.0, bare_s=4.0), batch_size=8) == 1.0
    assert ratio_of(Turn(num_steps=2, num_images=16, seconds=8.0, bare_s=4.0), batch_size=8) == 0.5


def training() -> ClassifierTraining:
    preprocessing = Preprocessing(resize=SIDE, image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pixels, labels = np.zeros((32, 3, SIDE, SIDE), np.uint8), torch.arange(32) % 3
    split = PackedSplit(pixels, torch.arange(32), labels, [], preprocessing)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(2, 3, SIDE, SIDE))
    spec = ClassifierJob.model_validate({"dataset": "d", **BASIS, "precision": "float32"})
    return ClassifierTraining(spec, network, split, split, preprocessing, torch.device("cpu"))


def test_bare_steps_train_a_copy_and_leave_the_training_alone() -> None:
    measured = training()
    before = {name: tensor.clone() for name, tensor in bare_state(measured.network).items()}
    step = BareStep(measured, SIDE)
    copied = {name: tensor.clone() for name, tensor in bare_state(step.network).items()}
    assert step.seconds(3) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in bare_state(measured.network).items())
    assert not torch.equal(bare_state(step.network)["0.weight"], copied["0.weight"])
    assert step.num_images == 8


def test_made_up_images_are_measured(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    write_made_up(volume, "d", 90)
    dataset = read_dataset(volume, "d")
    assert isinstance(dataset, ImageDataset)
    assert (len(dataset.classes), dataset.image_size, dataset.packed) == (200, (64, 64), True)
    assert len(read_index(volume.dataset("d"), "train")) == 90
    spec = ClassifierJob.model_validate({"dataset": "d", **BASIS, "image_size": 32, "epochs": 2})
    row = measure(spec, volume, "cpu")
    # 11 whole batches and one of 2, in turns of 3 steps, twice.
    assert (row.num_images, row.epochs, row.num_turns) == (180, 2, 8)
    assert row.images_per_s == pytest.approx(180 / row.seconds)
    assert row.bare_images_per_s > 0
    assert sum(row.shares.values()) == pytest.approx(1.0)
    assert min(row.shares[part] for part in ("data", "forward", "backward", "update")) > 0
    assert row.shares["communication"] == 0.0
    assert not volume.runs.exists()


def test_too_few_steps_to_measure(tmp_path: Path) -> None:
    write_made_up(Volume(tmp_path), "d", 16)
    spec = ClassifierJob.model_validate({"dataset": "d", **BASIS, "image_size": 32})
    with pytest.raises(InvalidRequest, match=r"an epoch of 2 steps is too short.*--limit-train-images"):
        measure(spec, Volume(tmp_path), "cpu")


def test_groups_of_devices() -> None:
    assert device_group("cpu") == ["cpu"]
    assert device_group("cpu+cpu") == ["cpu", "cpu"]


def test_devices_that_are_not_here_or_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_group("cuda+cuda:1") == ["cuda:0", "cuda:1"]
    with pytest.raises(InvalidRequest, match=r"'cuda:5' is not here \(2 CUDA devices\)"):
        device_group("cuda:0+cuda:5")
    with pytest.raises(InvalidRequest, match="devices of one kind"):
        device_group("cpu+cuda:0")
    with pytest.raises(InvalidRequest, match="each GPU takes one process"):
        device_group("cuda+cuda:0")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--devices", "gpu"], "'gpu' is no device"),
        (["--devices", "cpu,,cpu"], "'' is no device"),
        (["--limit-train-images", "32"], "32 images are no batch of 64; lower --batch-size"),
        (["--arch", "resnet19"], "did you mean resnet1"),
        (["--arch", "alexnet", "--stem", "small"], "stem small"),
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "1"], "--batch-size"),
    ],
)
def test_wrong_usage(options: list[str], said: str) -> None:
    result = CliRunner().invoke(bench, ["train", *options])
    assert result.exit_code == 2
    assert said in result.output


def run_without_broker(program: str) -> "subprocess.CompletedProcess[str]":
    blocked = "import sys\nfor name in ('celery', 'kombu', 'redis'): sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["benchmarks.gpu_classification", "services.trainer.bench"])
def test_measuring_needs_no_broker(module: str) -> None:
    done = run_without_broker(f"import {module}; print({module}.__name__)")
    assert done.stdout.strip() == module, done.stderr


def test_the_block_of_the_broker_blocks() -> None:
    assert "ModuleNotFoundError" in run_without_broker("import celery").stderr


def test_the_command_imports_no_torch() -> None:
    program = "import sys, json, tandem.cli.bench; print(json.dumps('torch' in sys.modules))"
    done: Any = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) is False


_WRITES_ON = """
import json, pathlib, sys
scratch = pathlib.Path(json.loads(sys.stdin.read())["scratch"])
print(json.dumps({"type": "device", "device": "cpu"}), flush=True)
for number in range(10**9):
    (scratch / str(number)).touch()
"""


def test_interrupted_while_it_speaks_it_ends_the_process_before_the_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tandem.cli.bench._COMMAND", (sys.executable, "-c", _WRITES_ON))
    monkeypatch.setattr("tandem.cli.bench.click.echo", interrupted)
    with pytest.raises(click.Abort):
        bench.main(["train", "--devices", "cpu"], standalone_mode=False)
    assert list(tmp_path.iterdir()) == []
