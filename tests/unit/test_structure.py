"""The table of layers: shapes in terms of the batch size, parameters counted once, and the network left as it was."""

import subprocess
import sys

import pytest
import torch
from factories import MODELS, SIZE, classifier_card, language_card
from torch import Tensor, nn

from tandem.checkpoints.tensors import build_network
from tandem.errors import CheckpointCorrupt
from tandem.models.layers import Layer, from_json, shapes_text, to_json, total_parameters
from tandem.models.structure import layer_table

IMAGE = torch.zeros(1, 3, SIZE, SIZE)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def by_name(layers: list[Layer]) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers}


def test_shapes_of_a_classifier() -> None:
    layers = by_name(layer_table(build_network(classifier_card("resnet18")), IMAGE))
    assert layers["conv1"] == Layer("conv1", "Conv2d", (("B", 3, 32, 32),), (("B", 64, 16, 16),), 3 * 64 * 49)
    assert layers["layer2.0.downsample.0"].output == (("B", 128, 4, 4),)
    assert layers["layer1.0.relu"].num_calls == 2
    assert layers["fc"] == Layer("fc", "Linear", (("B", 512),), (("B", 5),), 512 * 5 + 5)
    assert "layer1" not in layers


@pytest.mark.parametrize("arch", ["resnet18", "vit_b_16", "convnext_tiny", "swin_t", "squeezenet1_1"])
def test_every_parameter_is_counted_once(arch: str) -> None:
    network = build_network(classifier_card(arch))
    assert total_parameters(layer_table(network, IMAGE)) == count(network)


def test_modules_with_parameters_of_their_own_are_layers() -> None:
    layers = by_name(layer_table(build_network(classifier_card("vit_b_16")), IMAGE))
    assert (layers[""].type, layers[""].num_parameters) == ("VisionTransformer", 768)
    attention = layers["encoder.layers.encoder_layer_0.self_attention"]
    assert shapes_text(attention.input) == "3×(B,5,768)"
    # Its parameters are used by the attention around it, which never calls it.
    inside = layers["encoder.layers.encoder_layer_0.self_attention.out_proj"]
    assert (inside.input, inside.num_calls, inside.num_parameters) == ((), 0, 768 * 768 + 768)


@pytest.mark.parametrize("model", MODELS)
def test_language_models(model: str) -> None:
    network = build_network(language_card(model))
    layers = by_name(layer_table(network, torch.zeros(1, 7, dtype=torch.int64)))
    assert layers["embedding"].input == (("B", 7),)
    assert layers["head"].output == (("B", 7, 20),)
    assert total_parameters(list(layers.values())) == count(network)


def test_nested_results_are_laid_flat() -> None:
    layers = by_name(layer_table(build_network(language_card("LSTM")), torch.zeros(1, 7, dtype=torch.int64)))
    assert layers["layers"].output == (("B", 7, 16), (2, "B", 16), (2, "B", 16))
    assert shapes_text(layers["layers"].output) == "(B,7,16) 2×(2,B,16)"


def test_a_tied_parameter_is_counted_in_its_first_layer() -> None:
    network = build_network(language_card("GRU", tied=True))
    layers = by_name(layer_table(network, torch.zeros(1, 7, dtype=torch.int64)))
    assert (layers["embedding"].num_parameters, layers["embedding"].num_shared) == (20 * 16, 0)
    assert (layers["head"].num_parameters, layers["head"].num_shared) == (20, 20 * 16)
    assert total_parameters(list(layers.values())) == count(network)


class Windows(nn.Module):
    """Cuts images into four windows and adds one row to the batch, as no sane network does."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = nn.Flatten(1)
        self.extra = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        cut: Tensor = self.windows(images.view(4 * len(images), -1))
        extra: Tensor = self.extra(torch.cat((cut[:1], cut)))
        return extra


def test_multiples_of_the_batch() -> None:
    layers = by_name(layer_table(Windows(), torch.zeros(3, 8)))
    assert layers["windows"].output == (("4B", 2),)
    assert layers["extra"].output == (("4B+1", 2),)


def test_the_network_is_left_as_it_was() -> None:
    network = build_network(classifier_card("resnet18"))
    network.train()
    frozen = network.get_submodule("bn1").eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    layer_table(network, IMAGE)
    assert network.training
    assert network.get_submodule("layer1").training
    assert not frozen.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in network.modules())
    network(torch.rand(2, 3, SIZE, SIZE)).sum().backward()


def test_a_network_that_fails_keeps_its_mode_and_no_hooks() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        layer_table(network, torch.zeros(1, 3))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_through_json_and_back() -> None:
    layers = layer_table(build_network(language_card("LSTM", tied=True)), torch.zeros(1, 7, dtype=torch.int64))
    data = to_json(layers)
    assert from_json(data) == layers
    assert data.count(b"\n") == len(layers) + 2


@pytest.mark.parametrize("data", [b"", b"{}", b'[{"name": "x"}]', b"[1", b'[{"name":"x","surprise":1}]'])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointCorrupt, match=r"network\.json is no table of layers"):
        from_json(data)


def test_the_table_is_read_without_torch() -> None:
    program = "import sys, tandem.models.layers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
