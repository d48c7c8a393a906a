"""An optimizer's state as plain tensors by name, so that it can be stored without pickle."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_PREFIX = "optimizer/"


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Return the state of `optimizer` as `optimizer/<parameter>/<key>`; scalars become tensors of no dimension."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{_PREFIX}{names[parameter]}/{key}"] = value.detach().cpu().contiguous()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned."""
    parameters = dict(network.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith(_PREFIX):
            parameter_name, _, key = name.removeprefix(_PREFIX).rpartition("/")
            parameter = parameters[parameter_name]
            # AdamW keeps its step counter on the CPU (unless capturable); moments live beside their parameter.
            device = "cpu" if key == "step" else parameter.device
            optimizer.state[parameter][key] = tensor.clone().to(device)


def pending_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of the state that `optimizer` has yet to make, for parameters that it has not updated so far."""
    total = 0
    for group in optimizer.param_groups:
        moments = 2 if "betas" in group else int(bool(group.get("momentum")))
        total += sum(moments * each.nbytes for each in group["params"] if each not in optimizer.state)
    return total


def decayed_groups(network: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict[str, object]]:
    """Return parameter groups that spare norms and biases (all of at most one dimension) the weight decay.

    With `decay_all` there is one group of all, as in the reference script.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if decay_all:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
