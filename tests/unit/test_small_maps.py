"""Convolutions over a few pixels as products: the same numbers, names and gradients, and only where they pay."""

import copy

import pytest
import torch
from torch import nn

from services.trainer.engine.small_maps import SmallMapConv2d, with_small_maps
from tandem.models.classifiers import build_classifier


@pytest.mark.parametrize(
    ("size", "stride", "kernel", "bias"), [(2, 1, 3, False), (4, 2, 3, True), (1, 1, 3, True), (1, 2, 5, False)]
)
def test_a_product_computes_the_convolution_and_its_gradients(size: int, stride: int, kernel: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(256, 512, kernel, stride, padding=kernel // 2, bias=bias)
    (small,) = with_small_maps(nn.Sequential(copy.deepcopy(plain)))
    assert isinstance(small, SmallMapConv2d)
    images = torch.randn(3, 256, size, size).contiguous(memory_format=torch.channels_last)
    results = []
    # In float32, so that nothing but the way of computing differs.
    side = (size + 2 * (kernel // 2) - kernel) // stride + 1
    ways = ((plain, plain), (small, lambda inputs: small._as_product(inputs, side, side)))
    for layer, compute in ways:
        inputs = images.clone().requires_grad_()
        result = compute(inputs)
        (result * torch.arange(result.numel()).view(result.shape).cos()).sum().backward()
        results.append((result, inputs.grad, *(parameter.grad for parameter in layer.parameters())))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_names_and_weights_stay_and_evaluation_is_the_plain_convolution() -> None:
    network = build_classifier("resnet18", 3, 64)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    plain = copy.deepcopy(network).eval()
    with_small_maps(network)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert sum(isinstance(each, SmallMapConv2d) for each in network.modules()) == 4, "those of the last stage"
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network.eval()(images), plain(images))


def test_products_are_taken_in_bfloat16_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (small,) = with_small_maps(nn.Sequential(nn.Conv2d(512, 512, 3, padding=1)))
    assert isinstance(small, SmallMapConv2d)
    calls: list[tuple[int, int]] = []
    product = small._as_product

    def counted(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
        calls.append((height, width))
        return product(images, height, width)

    monkeypatch.setattr(small, "_as_product", counted)
    small(torch.randn(2, 512, 2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small(torch.randn(2, 512, 2, 2)).dtype == torch.bfloat16
        small(torch.randn(2, 512, 4, 4))
        small.eval()(torch.randn(2, 512, 2, 2))
    assert calls == [(2, 2)]


def test_grouped_and_dilated_convolutions_are_left_alone() -> None:
    layers = (nn.Conv2d(512, 512, 3, groups=2), nn.Conv2d(512, 512, 3, dilation=2), nn.Conv2d(512, 512, 1))
    assert all(type(layer) is nn.Conv2d for layer in with_small_maps(nn.Sequential(*layers)))
