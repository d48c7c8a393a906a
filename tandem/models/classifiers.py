"""Any torchvision classification architecture, with the right number of outputs for the right size of image."""

import inspect

import torch
from torch import nn
from torchvision import models

from tandem.errors import TrainingFailed


def build_classifier(arch: str, num_classes: int, image_size: int) -> nn.Module:
    """Return torchvision's `arch`, freshly initialised, from images (B, 3, S, S) to logits (B, num_classes).

    S is `image_size`. The Inception family is built without its auxiliary heads, so that every network returns one
    tensor. Raises TrainingFailed if the architecture can't take images of that size.
    """
    builder = models.get_model_builder(arch)
    options = {"weights": None, "num_classes": num_classes, **_options(arch, image_size)}
    try:
        with torch.device("meta"):
            _check_output(builder(**options), num_classes, image_size)
        network: nn.Module = builder(**options)
    except (RuntimeError, ValueError, AssertionError, torch.fx.proxy.TraceError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainingFailed(
            f"{arch} can't take {image_size}×{image_size} images ({reason}); try another --image-size, such as 224"
        ) from error
    return network


def _options(arch: str, image_size: int) -> dict[str, object]:
    # These fix the size of their input when they are built.
    if arch.startswith("vit_"):
        return {"image_size": image_size}
    if arch == "maxvit_t":
        # Its partitions must divide each stage's feature map; at 224 this gives the 7 of the paper.
        return {"input_size": (image_size, image_size), "partition_size": max(image_size // 32, 1)}
    if arch in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def _check_output(network: nn.Module, num_classes: int, image_size: int) -> None:
    """Run shapes alone through the network, on the meta device: no memory, no arithmetic."""
    network.eval()
    logits = network(torch.empty(1, 3, image_size, image_size, device="meta"))
    if tuple(logits.shape) != (1, num_classes):
        raise ValueError(f"its output has the shape {tuple(logits.shape)}")


def num_parameters(network: nn.Module) -> int:
    """Return the number of trainable values, a shared tensor counted once."""
    return sum(parameter.numel() for parameter in network.parameters())


def classifier_builders() -> dict[str, inspect.Signature]:
    """Return the signature of each torchvision classification builder by name."""
    names = models.list_models(module=models)
    return {name: inspect.signature(models.get_model_builder(name)) for name in names}
