"""The loss of a language model on a window, as one module: what DistributedDataParallel is put around."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from services.trainer.engine.output_loss import output_loss
from services.trainer.engine.precision import autocast, layer_precision
from services.trainer.engine.wrapping import compiled
from tandem.jobs.spec import LanguageModelJob
from tandem.models.devices import resolve_precision
from tandem.models.language_models import ModelState


class WindowLoss(NamedTuple):
    """Of one window: what is differentiated, and the plain loss, both sums over tokens in nats; and the state after."""

    objective: Tensor
    loss: Tensor
    state: ModelState


class SequenceLoss(nn.Module):
    """Computes losses of `network`, in the precision and with the penalties of `spec`."""

    def __init__(self, network: nn.Module, spec: LanguageModelJob, device: torch.device) -> None:
        super().__init__()
        precision = resolve_precision(spec.precision, device)
        self.network: Any = network
        self._device, self._spec = device, spec
        self._head_dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._precision = layer_precision(network, device, precision)
        self._encode: Any = self.network.encode
        if spec.compile:
            self._encode = compiled(self._encode)

    def forward(self, inputs: Tensor, targets: Tensor, state: ModelState | None) -> WindowLoss:
        """Return the loss of targets (B, T) after inputs (B, T), int64."""
        with autocast(self._device, self._precision):
            hidden, after = self._encode(inputs, state)
            dropped = self.network.output_dropout(hidden)
        loss = output_loss(
            dropped.flatten(0, 1), self.network.head.weight, self.network.head.bias, targets.flatten(), self._head_dtype
        )
        return WindowLoss(loss + targets.numel() * self._penalties(hidden, dropped), loss.detach(), after)

    def _penalties(self, hidden: Tensor, dropped: Tensor) -> Tensor | float:
        """Return AR and TAR (Merity, McCann and Socher 2017): large activations, and changes from token to token."""
        total: Tensor | float = 0.0
        if self._spec.activation_penalty:
            total = total + self._spec.activation_penalty * dropped.float().pow(2).mean()
        if self._spec.change_penalty and hidden.shape[1] > 1:
            total = total + self._spec.change_penalty * hidden.float().diff(dim=1).pow(2).mean()
        return total
