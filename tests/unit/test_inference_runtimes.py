"""Guarantee 5: a prediction does not depend on what it was batched with, to the bit on a CPU."""

from collections.abc import Iterator

import pytest
import torch
from factories import language_card
from torch import Tensor

from services.inference.classify import best_classes
from services.inference.runtimes.eager import EagerClassifier, EagerLanguageModel
from services.inference.scheduler import DeviceScheduler
from tandem.checkpoints.card import Preprocessing
from tandem.checkpoints.tensors import build_network
from tandem.data.manifest import ClassName
from tandem.errors import CheckpointCorrupt
from tandem.models.classifiers import build_classifier

CPU = torch.device("cpu")


@pytest.fixture
def scheduler() -> Iterator[DeviceScheduler]:
    scheduler = DeviceScheduler(CPU)
    yield scheduler
    scheduler.close()


def runtime_of(arch: str, size: int = 32, num_classes: int = 10) -> EagerClassifier:
    torch.manual_seed(1)
    network = build_classifier(arch, num_classes, size)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    # One pass for sensible statistics of BatchNorm.
    network.train()(torch.randn(8, 3, size, size))
    preprocessing = Preprocessing(resize=size, image_size=size, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    return EagerClassifier(network.eval().requires_grad_(False), preprocessing, CPU)


def images(count: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 64), ("squeezenet1_1", 32), ("mobilenet_v3_small", 32)])
async def test_an_image_alone_and_among_forty_gives_the_same_bits(
    scheduler: DeviceScheduler, arch: str, size: int
) -> None:
    runtime, pixels = runtime_of(arch, size), images(41, size)
    together = (await scheduler.predict(runtime, pixels)).value
    assert together.shape == (41, 10)
    assert together.std() > 0
    for batch in (1, 2, 5, 7, 16, 17, 31):
        pieces = [(await scheduler.predict(runtime, piece)).value for piece in torch.split(pixels, batch)]
        assert torch.equal(torch.cat(pieces), together), f"batches of {batch} differ from batches of 32"


async def test_networks_that_keep_a_rest_keep_it_small(scheduler: DeviceScheduler) -> None:
    runtime, pixels = runtime_of("efficientnet_b0"), images(17)
    together = (await scheduler.predict(runtime, pixels)).value
    alone = torch.cat([(await scheduler.predict(runtime, piece)).value for piece in torch.split(pixels, 1)])
    torch.testing.assert_close(alone, together, atol=1e-5 * float(together.abs().max()), rtol=0)


def test_the_best_classes_come_first_and_top_k_is_clipped() -> None:
    classes = [ClassName(id=f"n{number}", words=f"w{number}") for number in range(3)]
    (row,) = best_classes(torch.tensor([[0.0, 2.0, 1.0]]), classes, 5)
    assert [each.id for each in row] == ["n1", "n2", "n0"]
    assert row[0].words == "w1"
    assert sum(each.probability for each in row) == pytest.approx(1)
    assert len(best_classes(torch.zeros(2, 3), classes, 2)[1]) == 2


def test_answers_that_are_no_numbers_are_refused() -> None:
    runtime = runtime_of("squeezenet1_1")
    runtime.warm()
    next(runtime._network.parameters()).data.fill_(torch.nan)
    with pytest.raises(CheckpointCorrupt, match="finite"):
        runtime.warm()


def test_a_language_model_steps_with_its_state() -> None:
    network = build_network(language_card("GRU", 20)).eval()
    runtime = EagerLanguageModel(network, CPU)  # type: ignore[arg-type]
    runtime.warm()
    _, state = runtime.step([1, 2, 3], None)
    logits, _ = runtime.step([4], state)
    whole, _ = runtime.step([1, 2, 3, 4], None)
    torch.testing.assert_close(logits, whole, atol=1e-6, rtol=1e-5)
    assert logits.shape == (20,)
