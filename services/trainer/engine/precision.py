"""The precision that a training run computes in."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from tandem.errors import TrainingFailed
from tandem.jobs.spec import ClassifierJob
from tandem.models.classifiers import strides_over_one_pixel
from tandem.models.devices import resolve_precision
from tandem.models.transformer import TransformerLanguageModel


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context in which a forward pass computes in `precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def layer_precision(network: nn.Module, device: torch.device, precision: str) -> str:
    """Return the precision of what lies before the head of a language model that computes in `precision`.

    In bfloat16 on a CPU recurrent layers stay in float32, and with them the state that is carried through the text: the
    head is most of the work. What bfloat16 in the layers does to perplexity has not been measured; two LSTM layers of
    200 or 650 would take 0.66 and 0.70 of their time, forward and backward (2 threads with AMX, n = 4).
    """
    is_slow = device.type == "cpu" and not isinstance(network, TransformerLanguageModel)
    return "float32" if is_slow else precision


def training_precision(
    spec: ClassifierJob, network: nn.Module, device: torch.device, image_size: int
) -> Literal["float32", "bfloat16"]:
    """Return the precision to train in; `image_size` is the smallest side that `network` will see.

    On a CPU, bfloat16 is passed over where its gradients are wrong. Raises TrainingFailed if it was asked for by name.
    """
    precision = resolve_precision(spec.precision, device)
    if precision == "float32" or device.type != "cpu" or not strides_over_one_pixel(network, image_size):
        return precision
    if spec.precision == "auto":
        return "float32"
    raise TrainingFailed(
        f"{spec.arch} can't be trained in bfloat16 on a CPU at {image_size}×{image_size}: its last convolutions see "
        "one pixel, for which torch's gradients are wrong; use --precision float32 or a larger --image-size"
    )
