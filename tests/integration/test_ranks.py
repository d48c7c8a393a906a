"""Two processes compute the updates that one computes, where no batch norm and no dropout sees half a batch."""

import multiprocessing
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from services.trainer.engine.classifier import ClassifierTraining
from services.trainer.engine.ranks import ALONE, Ranks
from services.trainer.engine.reports import EpochDone
from tandem.checkpoints.card import Preprocessing
from tandem.data.splits import PackedSplit
from tandem.jobs.spec import ClassifierJob

PREPROCESSING = Preprocessing(resize=16, image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def split(count: int) -> PackedSplit:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    rows = torch.arange(count)
    return PackedSplit(pixels.numpy(), rows, rows % 3, [f"{row}.png" for row in range(count)], PREPROCESSING)


def train(ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
    """Return the weights, one after another, and the metrics of two epochs with a batch that can't be cut evenly."""
    spec = ClassifierJob(
        dataset="d", model_name="m", arch="resnet18", epochs=2, batch_size=11, accumulation=2, learning_rate=0.1,
        image_size=16, precision="float32", num_devices=ranks.size,
    )  # fmt: skip
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    training = ClassifierTraining(spec, network, split(41), split(13), PREPROCESSING, torch.device("cpu"), ranks)
    epochs = [report for report in training.fit() if isinstance(report, EpochDone)]
    weights = torch.cat([value.flatten() for value in training.served_network.state_dict().values()])
    return weights, dict(epochs[-1].metrics)


def one_of_two(rank: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    weights, metrics = train(Ranks(rank, 2, dist.group.WORLD))
    answers.put((rank, weights.tolist(), metrics))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, dict[str, float]]]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    store = str(tmp_path_factory.mktemp("meeting") / "store")
    processes = [context.Process(target=one_of_two, args=(rank, store, answers), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    return [(torch.tensor(weights), metrics) for _, weights, metrics in found]


def test_the_weights_are_those_of_one_process(two: list[tuple[Tensor, dict[str, float]]]) -> None:
    alone, _ = train(ALONE)
    (first, _), (second, _) = two
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


def test_the_metrics_are_those_of_one_process(two: list[tuple[Tensor, dict[str, float]]]) -> None:
    _, alone = train(ALONE)
    for _, metrics in two:
        assert metrics == pytest.approx(alone, rel=1e-4)
