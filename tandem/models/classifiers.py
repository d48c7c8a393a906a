"""Any torchvision classification architecture, with the right number of outputs for the right size of image."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tandem.errors import TrainingFailed
from tandem.vision import models


def build_classifier(
    arch: str, num_classes: int, image_size: int, stem: Literal["stock", "small"] = "stock"
) -> nn.Module:
    """Return torchvision's `arch`, freshly initialised, from images (B, 3, S, S) to logits (B, num_classes).

    S is `image_size`. The Inception family is built without its auxiliary heads, so that every network returns one
    tensor. A small stem (ResNet family) sees each pixel: a 3×3 convolution of stride 1 and no pooling, as He et al.
    (2015) use for 32 px. Raises TrainingFailed if the architecture can't be built for that size.
    """
    with _size_errors(arch, image_size):
        options = _options(arch, image_size)
        network: Any = models.get_model(arch, weights=None, num_classes=num_classes, **options)
    if stem == "small":
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
        # As torchvision initialises the convolutions of its ResNets.
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    built: nn.Module = network
    return built


def _options(arch: str, image_size: int) -> dict[str, object]:
    # These fix the size of their input when they are built.
    if arch.startswith("vit_"):
        return {"image_size": image_size}
    if arch == "maxvit_t":
        return {"input_size": (image_size, image_size)}
    if arch in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def check_image_size(network: nn.Module, arch: str, num_classes: int, image_size: int) -> None:
    """Run one blank image through `network`; raise TrainingFailed if it can't take that size."""
    was_training = network.training
    network.eval()
    with torch.inference_mode(), _size_errors(arch, image_size):
        logits = network(torch.zeros(1, 3, image_size, image_size))
        if tuple(logits.shape) != (1, num_classes):
            raise ValueError(f"its output has the shape {tuple(logits.shape)}")
    network.train(was_training)


def count_classes(network: nn.Module, image_size: int) -> int:
    """Return how many outputs `network` has for images of that size."""
    was_training, device = network.training, next(network.parameters()).device
    with torch.inference_mode():
        count = network.eval()(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]
    network.train(was_training)
    return int(count)


def strides_over_one_pixel(network: nn.Module, image_size: int) -> bool:
    """Return whether a convolution with a stride sees a single pixel when `network` takes images of that size.

    oneDNN (torch 2.15, AMX) leaves parts of the bfloat16 gradient of such a convolution's weights unwritten: they come
    out as whatever lay in memory, NaN included.
    """
    found: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and max(module.kernel_size) > 1:
            found.append(min(inputs[0].shape[-2:]) == 1)

    hooks = [module.register_forward_pre_hook(look) for module in network.modules()]
    try:
        count_classes(network, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return any(found)


@contextmanager
def _size_errors(arch: str, image_size: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainingFailed(
            f"{arch} can't take {image_size}×{image_size} images ({reason}); try another --image-size, such as 224"
        ) from error


def head_parameters(arch: str, image_size: int) -> frozenset[str]:
    """Return the names of the parameters whose shape follows the number of classes."""
    with torch.device("meta"):
        shapes = [
            {name: tensor.shape for name, tensor in build_classifier(arch, count, image_size).named_parameters()}
            for count in (2, 3)
        ]
    return frozenset(name for name, shape in shapes[0].items() if shape != shapes[1][name])


def num_parameters(network: nn.Module) -> int:
    """Return the number of trainable values, a shared tensor counted once."""
    return sum(parameter.numel() for parameter in network.parameters())


def classifier_builders() -> dict[str, inspect.Signature]:
    """Return the signature of each torchvision classification builder by name."""
    names = models.list_models(module=models)
    return {name: inspect.signature(models.get_model_builder(name)) for name in names}
