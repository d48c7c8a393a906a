"""The training process by itself, without a broker: what it leaves behind, and that a SIGKILL changes nothing."""

import os
import random
import re
import signal
import time
from typing import Any

import pytest
from samples import write_image_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from training_process import end_state, events, finish, new_run, start

from tandem.checkpoints.files import list_checkpoints
from tandem.volume import Volume

BASIS = {"kind": "train_classifier", "dataset": "shapes", "model_name": "m", "arch": "resnet18", "batch_size": 16}
# Quick to train and to save.
SMALL = {**BASIS, "arch": "shufflenet_v2_x0_5"}
# All that has state: an average, mixed images, parts of updates, growing images.
STATEFUL = {
    **SMALL,
    "epochs": 12,
    "ema_decay": 0.95,
    "cutmix": 1.0,
    "mixup": 0.2,
    "accumulation": 2,
    "start_size": 16,
    "schedule": "onecycle",
    "precision": "float32",
    "num_threads": 1,
    "checkpoint_every_s": 0.05,
}


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    volume = Volume(tmp_path_factory.mktemp("volume"))
    write_image_dataset(volume, "shapes")
    return volume


def test_killed_at_random_steps_a_run_ends_in_the_same_bytes(volume: Volume) -> None:
    straight = new_run(volume, "straight", STATEFUL)
    finish(straight)
    killed = new_run(volume, "killed", STATEFUL)
    chance = random.Random(time.time_ns())
    steps = []
    attempts = 3
    for attempt in range(1, attempts + 1):
        process = start(killed, attempt)
        for event in events(process):
            if event["type"] in ("started", "checkpoint"):
                steps.append(event.get("step", 0))
                time.sleep(chance.uniform(0, 0.4))
                if chance.random() < 0.4 or event["step"] > 6 * attempt:
                    break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = finish(killed, attempts + 1)
    assert last["attempt"] == attempts + 1
    assert end_state(killed) == end_state(straight), f"killed after {steps}"


def test_images_augmented_by_loader_processes_resume_exactly_too(volume: Volume) -> None:
    values = {**SMALL, "epochs": 3, "auto_augment": "randaugment", "color_jitter": 0.3, "num_workers": 2}
    values |= {"precision": "float32", "checkpoint_every_s": 0.01}
    straight = new_run(volume, "loaded-straight", values)
    finish(straight)
    killed = new_run(volume, "loaded-killed", values)
    process = start(killed, 1)
    next(event for event in events(process) if event["type"] == "checkpoint" and event["step"] >= 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(killed, 2)
    assert end_state(killed) == end_state(straight)


def test_asked_to_stop_it_saves_though_loaders_run(volume: Volume) -> None:
    values = {**SMALL, "epochs": 500, "color_jitter": 0.3, "num_workers": 2, "checkpoint_every_s": 3600.0}
    run = new_run(volume, "stopped", values)
    process = start(run, 1)
    stream = events(process)
    next(event for event in stream if event["type"] == "progress")
    process.terminate()
    (*_, last) = stream
    assert last["outcome"] == "stopped"
    assert process.wait(240) == 0
    assert list_checkpoints(run)


@pytest.fixture(scope="module")
def drawn(volume: Volume) -> EventAccumulator:
    run = new_run(volume, "drawn", {**BASIS, "epochs": 2, "flip_evaluation": True, "learning_rate": 0.02})
    last = finish(run)
    assert "val_flip_acc1" in last["metrics"]
    # Keep every scalar and picture.
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_what_the_report_wanted(drawn: EventAccumulator) -> None:
    tags = drawn.Tags()
    assert tags["graph"]
    wanted = {"train_loss", "train_acc1", "train_acc5", "val_loss", "val_acc1", "val_acc5", "val_best_acc1"}
    wanted |= {"learning_rate", "images_per_s", "epoch_time_s", "total_time_s", "val_flip_acc1"}
    assert wanted <= set(tags["scalars"])
    assert {"final/val_acc1", "final/val_loss"} <= set(tags["scalars"])
    assert {"misclassified", "confusion"} <= set(tags["images"])
    (picture,) = drawn.Images("confusion")
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert [point.step for point in drawn.Scalars("val_acc1")] == [1, 2]
    assert drawn.Scalars("train_acc5")[0].value == 100.0, "three classes: all are right at rank 5"
    assert any("hparams" in tag for tag in drawn.summary_metadata), "the HParams page"


def test_a_checkpoint_of_another_run_is_continued(volume: Volume) -> None:
    first = new_run(volume, "first", {**BASIS, "epochs": 2, "precision": "float32"})
    finish(first)
    # A rate at which nothing can get better than the first run's best.
    longer = {**BASIS, "epochs": 4, "precision": "float32", "resume_from": "run:first", "learning_rate": 1e-9}
    second = new_run(volume, "second", longer)
    process = start(second, 1)
    told = list(events(process))
    assert next(event["step"] for event in told if event["type"] == "started") > 0
    assert [event["epoch"] for event in told if event["type"] == "epoch"][-1] == 4
    assert told[-1]["outcome"] == "succeeded", told[-1]
    assert list((second / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": "inception_v3", "image_size": 64}, "inception_v3 can't take 64×64 images .*--image-size"),
        ({"arch": "vit_b_16", "image_size": 40}, "vit_b_16 can't take 40×40 images"),
        ({"arch": "vit_b_16", "start_size": 16}, "vit_b_16 can't take 16×16 images"),
        ({"weights_file": "weights/w"}, "weights/w can't be read"),
        ({"learning_rate": 1e30, "warmup_epochs": 0}, "finite|the loss became"),
    ],
)
def test_what_can_not_be_trained_fails_at_the_start_with_one_line(
    volume: Volume, values: dict[str, Any], message: str
) -> None:
    run = new_run(volume, f"bad-{time.time_ns()}", {**BASIS, **values})
    process = start(run, 1)
    (*_, last) = events(process)
    assert process.wait(240) == 0
    assert last["outcome"] == "failed"
    assert re.search(message, last["message"]), last["message"]
    assert "\n" not in last["message"]
