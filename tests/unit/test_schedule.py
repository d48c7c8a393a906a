"""Learning rate and image size as functions of the step."""

import pytest
import torch

from services.trainer.engine.schedule import image_size_at, learning_rate_at
from tandem.jobs.spec import ClassifierJob

BASIS = {"dataset": "d", "model_name": "m", "arch": "resnet18", "learning_rate": 1.0, "epochs": 10}


def spec(**changes: object) -> ClassifierJob:
    return ClassifierJob.model_validate({**BASIS, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_warms_up_and_ends_at_zero(schedule: str) -> None:
    rates = [learning_rate_at(spec(schedule=schedule, warmup_epochs=1), step, 100) for step in range(1000)]
    assert rates[0] < rates[50] < rates[99] < 1.0
    assert rates[100] == 1.0
    assert rates[-1] < 2e-3
    assert rates[550] == pytest.approx(0.5, abs=1e-9), "half way both are at a half"


def test_steps_divide_the_rate_as_the_reference_does() -> None:
    thirds = spec(schedule="step", epochs=9, warmup_epochs=0)
    assert [round(learning_rate_at(thirds, 100 * epoch, 100), 6) for epoch in (1, 3, 6, 8)] == [1.0, 0.1, 0.01, 0.01]
    reference = spec(schedule="step", epochs=90, step_epochs=30, warmup_epochs=0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
    for epoch in range(90):
        assert learning_rate_at(reference, 7 * epoch, 7) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_one_cycle_is_that_of_torch() -> None:
    total = 10 * 20
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total)
    for step in range(total):
        rate = learning_rate_at(spec(schedule="onecycle"), step, 20)
        # torch rises by a cosine from the beginning on, as this does.
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6), step
        optimizer.step()
        scheduler.step()


def test_without_a_schedule_the_rate_stays() -> None:
    constant = spec(schedule="constant", warmup_epochs=0)
    assert {learning_rate_at(constant, step, 10) for step in range(100)} == {1.0}


def test_a_warm_up_as_long_as_the_run_is_none() -> None:
    assert learning_rate_at(spec(epochs=1, warmup_epochs=5, schedule="constant"), 0, 10) == 1.0


def test_images_grow_by_eights_to_their_final_size() -> None:
    growing = spec(start_size=40, growth=0.6, epochs=20)
    sizes = [image_size_at(growing, epoch, 64) for epoch in range(20)]
    assert sizes[0] == 40
    assert sizes == sorted(sizes)
    assert set(sizes) == {40, 48, 56, 64}
    assert sizes[12:] == [64] * 8
    assert {image_size_at(spec(), epoch, 64) for epoch in range(10)} == {64}
    odd = spec(start_size=40, epochs=10)
    assert image_size_at(odd, 9, 60) == 60
