"""What we use of torchvision, imported without torch's compiler.

Two of torchvision's modules ask the compiler for a function each when they are imported: one that leaves a function out
of compilation, and one that tells whether kernels can be compiled for a device. Each brings the whole compiler along,
which is nearly half of what a process needs to start (11.1 s of CPU time against 6.2 for the inference server; torch
2.15, torchvision 0.29), and which most never use. During their import a stand-in answers; torch.compile imports the
compiler itself when it is first called.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = ["ImageReadMode", "decode_image", "functional", "models", "v2"]

_NAMES = ("torch._dynamo", "torch._dynamo.utils")


def _leave(function: Any = None, *_: object, **__: object) -> Any:
    """Stand in for `torch._dynamo.disable`: what nobody compiles needs no leaving out."""
    return _leave if function is None else function


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


@contextmanager
def _without_compiler() -> Iterator[None]:
    if any(name in sys.modules for name in _NAMES):
        yield
        return
    compiler, utilities = (ModuleType(name) for name in _NAMES)
    asked: dict[ModuleType, dict[str, Callable[..., Any]]] = {
        compiler: {"disable": _leave},
        utilities: {"is_compile_supported": _is_compile_supported},
    }
    for module, functions in asked.items():
        vars(module).update(functions)
        sys.modules[module.__name__] = module
    try:
        yield
    finally:
        for name in _NAMES:
            del sys.modules[name]


with _without_compiler():
    from torchvision import models
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional
