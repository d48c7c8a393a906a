"""The weights of a network as tensors by name, and back."""

from collections.abc import Mapping

from torch import Tensor, nn

from tandem.errors import CheckpointCorrupt

# What compiling and distributing a network put before its names.
WRAPPERS = ("module.", "_orig_mod.")


def bare_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `network` on the CPU by the names of the bare module, a shared tensor once."""
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in network.state_dict().items():
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        # Tied weights share storage; safetensors stores each storage once, and loading ties them again.
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        state[name] = tensor.detach().cpu().contiguous()
    return state


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` into `network`; raise CheckpointCorrupt where names or shapes don't fit."""
    own = network.state_dict()
    tied = _tied_names(network)
    missing = [name for name in own if name not in tensors and tied.get(name, name) not in tensors]
    unexpected = [name for name in tensors if name not in own]
    wrong = [name for name in tensors if name in own and tensors[name].shape != own[name].shape]
    for problem, names in (("lack", missing), ("have an unknown", unexpected), ("have another shape of", wrong)):
        if names:
            raise CheckpointCorrupt(f"the weights {problem} {names[0]} (and {len(names) - 1} more)")
    network.load_state_dict(dict(tensors), strict=False)


def _tied_names(network: nn.Module) -> dict[str, str]:
    """Map each name of a shared parameter to the first name it has."""
    first: dict[int, str] = {}
    names = network.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in names}
