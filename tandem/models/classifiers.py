"""Any torchvision classification architecture, with the right number of outputs for the right size of image."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torchvision import models

from tandem.errors import TrainingFailed


def build_classifier(arch: str, num_classes: int, image_size: int) -> nn.Module:
    """Return torchvision's `arch`, freshly initialised, from images (B, 3, S, S) to logits (B, num_classes).

    S is `image_size`. The Inception family is built without its auxiliary heads, so that every network returns one
    tensor. Raises TrainingFailed if the architecture can't be built for that size.
    """
    with _size_errors(arch, image_size):
        options = _options(arch, image_size)
        network: nn.Module = models.get_model(arch, weights=None, num_classes=num_classes, **options)
    return network


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


@contextmanager
def _size_errors(arch: str, image_size: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainingFailed(
            f"{arch} can't take {image_size}×{image_size} images ({reason}); try another --image-size, such as 224"
        ) from error


def num_parameters(network: nn.Module) -> int:
    """Return the number of trainable values, a shared tensor counted once."""
    return sum(parameter.numel() for parameter in network.parameters())


def classifier_builders() -> dict[str, inspect.Signature]:
    """Return the signature of each torchvision classification builder by name."""
    names = models.list_models(module=models)
    return {name: inspect.signature(models.get_model_builder(name)) for name in names}
