"""Guarantee 5: a prediction does not depend on what it was batched with, to the bit on a CPU."""

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from factories import language_card
from torch import Tensor, nn

from services.inference.classify import best_classes
from services.inference.runtimes import openvino
from services.inference.runtimes.eager import EagerClassifier
from services.inference.runtimes.interface import Precision
from services.inference.runtimes.language import EagerLanguageModel
from services.inference.runtimes.openvino import SIZES, GraphCache, OpenVinoClassifier
from services.inference.runtimes.pixels import FromPixels, in_buckets
from services.inference.scheduler import DeviceScheduler
from tandem.checkpoints.card import Preprocessing
from tandem.checkpoints.tensors import build_network
from tandem.data.images import normalise
from tandem.data.manifest import ClassName
from tandem.errors import CheckpointCorrupt
from tandem.models.classifiers import build_classifier

CPU = torch.device("cpu")


@pytest.fixture
def scheduler() -> Iterator[DeviceScheduler]:
    scheduler = DeviceScheduler(CPU)
    yield scheduler
    scheduler.close()


def network_of(arch: str, size: int = 32, num_classes: int = 10, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    network = build_classifier(arch, num_classes, size)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    # One pass for sensible statistics of BatchNorm.
    network.train()(torch.randn(8, 3, size, size))
    return network.eval().requires_grad_(False)


def preprocessing_of(size: int) -> Preprocessing:
    return Preprocessing(resize=size, image_size=size, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def runtime_of(arch: str, size: int = 32, num_classes: int = 10) -> EagerClassifier:
    return EagerClassifier(network_of(arch, size, num_classes), preprocessing_of(size), CPU)


def openvino_of(graphs: GraphCache, network: nn.Module, size: int, precision: Precision) -> OpenVinoClassifier:
    graph = graphs.graph(FromPixels(network, preprocessing_of(size)), size)
    return OpenVinoClassifier(graph, size, precision, 2)


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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small"])
def test_openvino_gives_a_row_the_same_bits_at_any_size_place_and_among_any_neighbours(
    arch: str, precision: Precision
) -> None:
    runtime, pixels = openvino_of(GraphCache(), network_of(arch, 64), 64, precision), images(33, 64)
    assert runtime.dtype == precision
    alone = torch.cat([runtime.predict(image) for image in torch.split(pixels, 1)])
    assert len({tuple(row) for row in alone.tolist()}) == 33
    generator = torch.Generator().manual_seed(3)
    for size in range(1, 34):
        rows = torch.randint(0, 33, (size,), generator=generator)
        assert torch.equal(runtime.predict(pixels[:size]), alone[:size]), f"the first {size} differ"
        assert torch.equal(runtime.predict(pixels[rows]), alone[rows]), f"{size} drawn ones differ"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_openvino_gives_the_same_bits_beside_other_batches(precision: Precision) -> None:
    runtime, pixels = openvino_of(GraphCache(), network_of("resnet18", 64), 64, precision), images(40, 64)
    whole = runtime.predict(pixels)
    assert (runtime.beside_from, max(runtime.beside_sizes)) == (4, 16)
    for size in runtime.beside_sizes:
        on_streams = runtime.on_each_stream(pixels[:size])
        assert len(on_streams) == 2
        assert all(torch.equal(each, whole[:size]) for each in on_streams)
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 40, (int(size),), generator=generator) for size in torch.randint(1, 17, (60,))]
    with ThreadPoolExecutor(2) as workers:
        answers = list(workers.map(lambda each: runtime.predict_beside(pixels[each]), rows))
    assert all(torch.equal(answer, whole[each]) for answer, each in zip(answers, rows, strict=True))


def test_openvino_takes_weights_over_into_a_graph_of_the_same_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, graphs = images(5), GraphCache()
    first, second = network_of("resnet18", seed=1), network_of("resnet18", seed=2)
    expected = [openvino_of(GraphCache(), each, 32, "float32").predict(pixels) for each in (first, second)]
    assert not torch.equal(*expected)
    kept = openvino_of(graphs, first, 32, "float32")
    convert, calls = openvino._convert, list[int]()

    def counted(network: FromPixels, image_size: int) -> Any:
        calls.append(image_size)
        return convert(network, image_size)

    monkeypatch.setattr(openvino, "_convert", counted)
    swapped = openvino_of(graphs, second, 32, "float32")
    assert calls == []
    assert torch.equal(swapped.predict(pixels), expected[1])
    assert torch.equal(kept.predict(pixels), expected[0])
    openvino_of(graphs, network_of("resnet18", num_classes=11), 32, "float32")
    assert len(calls) == 1


def test_a_structure_is_traced_once_and_all_but_its_first_graph_goes_with_its_model() -> None:
    graphs, gone = GraphCache(), []
    for _ in range(3):
        runtime = openvino_of(graphs, network_of("squeezenet1_1"), 32, "float32")
        gone.append((weakref.ref(runtime), weakref.ref(runtime._graph)))
        del runtime
    gc.collect()
    assert [(runtime() is None, graph() is None) for runtime, graph in gone] == [
        (True, False),
        (True, True),
        (True, True),
    ]
    assert len(graphs._graphs) == 1


def test_the_graphs_of_the_last_structures_are_kept_and_no_more() -> None:
    graphs, gone = GraphCache(), []
    for num_classes in (5, 6, 7):
        runtime = openvino_of(graphs, network_of("squeezenet1_1", num_classes=num_classes), 32, "float32")
        gone.append(weakref.ref(runtime._graph))
        del runtime
    gc.collect()
    assert [each() is None for each in gone] == [True, False, False]


def test_answers_of_openvino_are_not_overwritten_by_the_next() -> None:
    runtime, pixels = openvino_of(GraphCache(), network_of("squeezenet1_1"), 32, "float32"), images(2)
    first = runtime.predict(pixels[:1])
    kept = first.clone()
    assert not torch.equal(runtime.predict(pixels[1:]), kept)
    assert torch.equal(first, kept)


def test_pixels_are_normalised_as_everywhere() -> None:
    preprocessing = Preprocessing(resize=8, image_size=8, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = images(9, 8)
    assert torch.equal(FromPixels(nn.Flatten(), preprocessing)(pixels), normalise(pixels, preprocessing).flatten(1))


def test_batches_are_filled_up_to_the_next_size_and_cut_at_the_last() -> None:
    sizes: list[int] = []

    def run(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        return pixels.flatten(1)[:, :4].float()

    for count, expected in ((1, [1]), (9, [12]), (32, [32]), (75, [32, 32, 12])):
        sizes.clear()
        pixels = images(count, 8)
        assert torch.equal(in_buckets(pixels, SIZES, run), pixels.flatten(1)[:, :4].float())
        assert sizes == expected


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
