"""Two processes compute the updates that one computes, where no batch norm and no dropout sees half a batch."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from training_runs import run

from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.ranks import ALONE, Ranks
from tandem.checkpoints.card import Preprocessing
from tandem.data.splits import PackedSplit
from tandem.jobs.spec import ClassifierJob, LanguageModelJob
from tandem.models.language_models import LanguageModelShape, build_language_model
from tandem.models.weights import bare_state, load_weights

Outcome = tuple[Tensor, dict[str, float]]

PREPROCESSING = Preprocessing(resize=16, image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def split(count: int) -> PackedSplit:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    rows = torch.arange(count)
    return PackedSplit(pixels.numpy(), rows, rows % 3, [f"{row}.png" for row in range(count)], PREPROCESSING)


def train(ranks: Ranks) -> Outcome:
    """Return the weights, one after another, and the metrics of two epochs with a batch that can't be cut evenly."""
    spec = ClassifierJob(
        dataset="d", model_name="m", arch="resnet18", epochs=2, batch_size=11, accumulation=2, learning_rate=0.1,
        image_size=16, precision="float32", num_devices=ranks.size,
    )  # fmt: skip
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    training = ClassifierTraining(spec, network, split(41), split(13), PREPROCESSING, torch.device("cpu"), ranks)
    epochs = run(training)
    weights = torch.cat([value.flatten() for value in training.served_network.state_dict().values()])
    return weights, dict(epochs[-1].metrics)


def train_words(ranks: Ranks, stop_at: int | None = None) -> Outcome:
    """As `train`, a language model on rows that can't be shared evenly; resumed anew at `stop_at`."""
    spec = LanguageModelJob(
        dataset="d", model_name="m", model="GRU", epochs=2, batch_size=5, bptt=8, accumulation=2, learning_rate=0.02,
        dropout=0.0, precision="float32", num_devices=ranks.size,
    )  # fmt: skip
    text = (torch.arange(400) * 3 + torch.arange(400) // 7) % 11

    def make() -> LanguageModelTraining:
        torch.manual_seed(0)
        network = build_language_model(LanguageModelShape("GRU", 11, 16, 16, 2, 2, 0.0, False, 16))
        return LanguageModelTraining(spec, network, text, text[:90], torch.device("cpu"), ranks)

    training = make()
    if stop_at:
        run(training, until=lambda step: step == stop_at)
        weights, state = bare_state(training.network), training.snapshot()
        training = make()
        load_weights(training.network, weights)
        training.restore(state)
    epochs = run(training)
    weights_of_all = torch.cat([value.flatten() for value in training.network.state_dict().values()])
    return weights_of_all, dict(epochs[-1].metrics)


JOBS: dict[str, Callable[[Ranks], Outcome]] = {
    "images": train,
    "words": train_words,
    "words, resumed": partial(train_words, stop_at=4),
}


def one_of_two(rank: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    found = {name: job(Ranks(rank, 2, dist.group.WORLD)) for name, job in JOBS.items()}
    answers.put((rank, {name: (weights.tolist(), metrics) for name, (weights, metrics) in found.items()}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    store = str(tmp_path_factory.mktemp("meeting") / "store")
    processes = [context.Process(target=one_of_two, args=(rank, store, answers), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    return [
        {name: (torch.tensor(weights), metrics) for name, (weights, metrics) in found[rank].items()}
        for rank in range(2)
    ]


@pytest.mark.parametrize("name", ["images", "words"])
def test_weights_and_metrics_are_those_of_one_process(two: list[dict[str, Outcome]], name: str) -> None:
    weights, metrics = JOBS[name](ALONE)
    assert torch.equal(two[0][name][0], two[1][name][0])
    for outcome in two:
        torch.testing.assert_close(outcome[name][0], weights, rtol=1e-4, atol=1e-5)
        assert outcome[name][1] == pytest.approx(metrics, rel=1e-4)


def test_a_resumed_run_of_two_processes_ends_in_the_same_bits(two: list[dict[str, Outcome]]) -> None:
    for outcome in two:
        assert torch.equal(outcome["words, resumed"][0], outcome["words"][0])
        assert outcome["words, resumed"][1] == pytest.approx(outcome["words"][1], rel=1e-6)
