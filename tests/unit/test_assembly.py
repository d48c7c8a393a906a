"""A job assembled from its spec, as the training process does, and run in this one."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from services.trainer.assembly import assemble
from services.trainer.engine.reports import EpochDone
from tandem.data.prepare import prepare_dummy
from tandem.jobs.spec import make_spec
from tandem.volume import Volume


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    volume = Volume(tmp_path / "home")
    prepare_dummy(volume, "dummy", num_classes=3, num_images=40, num_val_images=7, image_size=32, seed=0)
    return volume


@pytest.fixture
def settings_put_back() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def train(volume: Volume, **values: object) -> Mapping[str, float]:
    recipe = {"arch": "shufflenet_v2_x0_5", "batch_size": 16, "epochs": 1, "device": "cpu", **values}
    spec = make_spec({"kind": "train_classifier", "dataset": "dummy", "model_name": "m", **recipe})
    (done,) = (each for each in assemble(spec, volume, "run").training.fit() if isinstance(each, EpochDone))  # type: ignore[arg-type]
    return done.metrics


def test_dummy_data_can_be_trained_on(volume: Volume) -> None:
    metrics = train(volume)
    assert (metrics["val_acc1"] * 7 / 100) == pytest.approx(round(metrics["val_acc1"] * 7 / 100))


@pytest.mark.usefixtures("settings_put_back")
def test_deterministic_refuses_what_has_no_deterministic_kernel(volume: Volume) -> None:
    train(volume, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("settings_put_back")
def test_by_default_only_the_choice_of_kernels_is_fixed(volume: Volume) -> None:
    torch.use_deterministic_algorithms(False)
    train(volume)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
