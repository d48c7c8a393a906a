"""Training a language model in its process: exact after a SIGKILL, a clean end by Ctrl-C, and what TensorBoard gets."""

import os
import random
import signal
import time
from typing import Any

import pytest
from samples import write_text_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from training_process import end_state, events, finish, new_run, start

from tandem.checkpoints.files import list_checkpoints
from tandem.volume import Volume

BASIS: dict[str, Any] = {
    "kind": "train_language_model",
    "dataset": "text",
    "model_name": "m",
    "model": "LSTM",
    "embedding_size": 16,
    "hidden_size": 16,
    "batch_size": 4,
    "bptt": 10,
    "num_threads": 1,
}
# All that has state: what is carried between windows, parts of updates, windows of random lengths, an average.
STATEFUL = {
    **BASIS,
    "model": "AWD_LSTM",
    "tied": True,
    "weight_dropout": 0.5,
    "variable_bptt": True,
    "accumulation": 2,
    "epochs": 6,
    "average_after": 1,
    "schedule": "constant",
    "learning_rate": 0.3,
    "checkpoint_every_s": 0.05,
}


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    volume = Volume(tmp_path_factory.mktemp("volume"))
    write_text_dataset(volume, "text")
    return volume


def test_killed_at_random_steps_a_run_ends_in_the_same_bytes(volume: Volume) -> None:
    straight, killed = new_run(volume, "straight", STATEFUL), new_run(volume, "killed", STATEFUL)
    finish(straight)
    chance = random.Random(time.time_ns())
    steps = []
    for attempt in (1, 2):
        process = start(killed, attempt)
        for event in events(process):
            if event["type"] in ("started", "checkpoint"):
                steps.append(event["step"])
                time.sleep(chance.uniform(0, 0.2))
                if chance.random() < 0.4:
                    break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert finish(killed, 3)["attempt"] == 3
    assert end_state(killed) == end_state(straight), f"killed after {steps}"


def test_ctrl_c_saves_and_tests_the_best_so_far(volume: Volume) -> None:
    run = new_run(volume, "interrupted", {**BASIS, "epochs": 100_000})
    process = start(run, 1)
    stream = events(process)
    next(event for event in stream if event["type"] == "epoch" and event["epoch"] == 2)
    process.send_signal(signal.SIGINT)
    (*_, last) = stream
    assert process.wait(240) == 0
    assert last["outcome"] == "stopped"
    assert "; the best checkpoint, " in last["message"]
    assert "test_ppl " in last["message"]
    assert last["metrics"]["test_ppl"] > 1
    assert list_checkpoints(run)
    assert "Traceback" not in (run / "log.txt").read_text()


def test_a_stop_that_is_not_for_good_tests_nothing(volume: Volume) -> None:
    run = new_run(volume, "stopped", {**BASIS, "epochs": 100_000})
    process = start(run, 1)
    stream = events(process)
    next(event for event in stream if event["type"] == "epoch")
    process.terminate()
    (*_, last) = stream
    assert last["outcome"] == "stopped"
    assert last["message"].startswith("stopped at step ")
    assert "best" not in last["message"]


@pytest.mark.parametrize("model", ["Transformer", "LSTM", "RNN_TANH", "AWD_LSTM"])
def test_tensorboard_has_curves_samples_and_the_graph(volume: Volume, model: str) -> None:
    run = new_run(volume, f"drawn-{model}", {**BASIS, "model": model, "epochs": 2})
    last = finish(run)
    assert {"test_loss", "test_ppl"} <= last["metrics"].keys()
    drawn = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    drawn.Reload()
    tags = drawn.Tags()
    wanted = {"train_loss", "train_ppl", "val_loss", "val_ppl", "learning_rate", "gradient_norm", "words_per_s"}
    assert wanted | {"test_ppl", "epoch_time_s", "total_time_s", "final/test_ppl"} <= set(tags["scalars"])
    assert any("hparams" in tag for tag in drawn.summary_metadata), "the HParams page"
    assert tags["graph"]
    parts = {node.name for node in drawn.Graph().node}
    assert any("head" in name for name in parts)
    assert any("embedding" in name for name in parts)
    samples = drawn.Tensors("sample/text_summary")
    assert [each.step for each in samples] == [1, 2]
    assert len(samples[0].tensor_proto.string_val[0].decode().split()) > 20


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"batch_size": 5000}, "too few for a batch of 5000; lower --batch-size"),
        ({"learning_rate": 1e30, "optimizer": "sgd", "clip_norm": 1e30}, "finite|the loss became"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not here"),
    ],
)
def test_what_can_not_be_trained_is_one_line(volume: Volume, values: dict[str, Any], says: str) -> None:
    run = new_run(volume, f"bad-{time.time_ns()}", {**BASIS, **values})
    process = start(run, 1)
    (*_, last) = events(process)
    assert process.wait(240) == 0
    assert last["outcome"] == "failed"
    assert any(each in last["message"] for each in says.split("|")), last["message"]
    assert "\n" not in last["message"]
