"""What a network is made of: its layers with their shapes, found by running it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tandem.models.layers import Layer, Shape

_Shapes = tuple[tuple[int, ...], ...]


class _Calls:
    """What a pass showed of one module: the shapes of its first call, and how many calls there were."""

    def __init__(self) -> None:
        self.input: _Shapes = ()
        self.output: _Shapes = ()
        self.count = 0

    def hook(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        if self.count == 0:
            self.input, self.output = _shapes((arguments, options)), _shapes(result)
        self.count += 1


def layer_table(network: nn.Module, example: Tensor) -> list[Layer]:
    """Return the layers of `network` in the order of its definition.

    `example` (B, …) is an input on the network's device, batch first; its first row is passed through in eval mode,
    alone and doubled: sizes that grow between the two follow the batch. Parameters, buffers, gradients, random
    generators and the mode of each module stay as they were. Give the bare network, not one that is compiled or
    distributed.
    """
    modules = {name: module for name, module in network.named_modules() if _is_layer(module)}
    with _evaluating(network):
        one, two = (_observe(network, modules, torch.cat([example[:1]] * size)) for size in (1, 2))
    seen: set[int] = set()
    return [
        _layer(name, module, one[name], two[name], seen)
        for name, module in modules.items()
        if one[name].count or _own_parameters(module)
    ]


def _is_layer(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) or bool(_own_parameters(module))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    # Each module's own mode: parts of a network may be frozen in eval mode while others train.
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _observe(network: nn.Module, modules: dict[str, nn.Module], example: Tensor) -> dict[str, _Calls]:
    calls = {name: _Calls() for name in modules}
    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(calls[name].hook, with_kwargs=True).remove)
        network(example)
    return calls


def _shapes(value: Any) -> _Shapes:
    """Return the shapes of the tensors in `value`, nested tuples, lists and dicts laid flat."""
    if isinstance(value, Tensor):
        return (tuple(value.shape),)
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return tuple(shape for part in value for shape in _shapes(part))
    return ()


def _layer(name: str, module: nn.Module, one: _Calls, two: _Calls, seen: set[int]) -> Layer:
    # A tied parameter may stand twice in one module too.
    parameters = {id(each): each.numel() for each in _own_parameters(module)}
    new = sum(size for identity, size in parameters.items() if identity not in seen)
    seen.update(parameters)
    return Layer(
        name=name,
        type=type(module).__name__,
        input=_with_batch(one.input, two.input),
        output=_with_batch(one.output, two.output),
        num_parameters=new,
        num_shared=sum(parameters.values()) - new,
        num_calls=one.count,
    )


def _with_batch(one: _Shapes, two: _Shapes) -> tuple[Shape, ...]:
    return tuple(
        tuple(_size(*sizes) for sizes in zip(first, second, strict=True))
        for first, second in zip(one, two, strict=True)
    )


def _size(one: int, two: int) -> int | str:
    """Return a size that is `one` for a batch of 1 and `two` for a batch of 2, in terms of the batch size B."""
    each, fixed = two - one, 2 * one - two
    if each == 0:
        return one
    return f"{each if each != 1 else ''}B" + (f"{fixed:+d}" if fixed else "")
