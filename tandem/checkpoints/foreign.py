"""Weights that others wrote: safetensors, or a state dict of `torch.save`, from which nothing but tensors is read.

A `.pth` file is a zip archive of raw storages and a pickle that says which tensors they make up. A pickle can name any
function; the reader here looks names up in a closed table of its own and refuses every other one, so that nothing in a
file decides what is called (the way of the standard library's documentation, "Restricting Globals").
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.checkpoints.tensors import from_bytes
from tandem.errors import CheckpointCorrupt
from tandem.models.weights import WRAPPERS

_REMEDY = "save its state dict as safetensors (safetensors.torch.save_file)"
# Where others put the weights among the rest of what they save.
_KEYS = ("state_dict", "model", "model_state_dict")
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file by the names of the bare module; raise CheckpointCorrupt where it has none.

    Taken are safetensors files, and zip files of torch.save (torch 1.6 and later) that hold a state dict, alone or
    under "state_dict" or "model", as the reference script saves it.
    """
    try:
        document = _read_zip(path) if zipfile.is_zipfile(path) else from_bytes(path.read_bytes())
    except OSError as error:
        raise CheckpointCorrupt(f"{path} can't be read: {error.strerror}") from error
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{path} is neither safetensors nor a state dict of torch.save; {_REMEDY}") from error
    except Exception as error:  # for damaged bytes pickle raises nearly everything there is
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointCorrupt(f"{path} holds no weights that can be read ({reason}); {_REMEDY}") from error
    for key in _KEYS:
        if isinstance(document, Mapping) and isinstance(document.get(key), Mapping):
            document = document[key]
    if not isinstance(document, Mapping):
        raise CheckpointCorrupt(f"{path} holds no state dict; {_REMEDY}")
    tensors = {_bare(str(name)): value for name, value in document.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointCorrupt(f"{path} holds no tensors; {_REMEDY}")
    return tensors


def _bare(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("it is no archive of torch.save")
        top = names[0].removesuffix("data.pkl")
        with archive.open(names[0]) as file:
            return _Reader(file, lambda key: archive.read(f"{top}data/{key}")).load()


class _Reader(pickle.Unpickler):
    """Reads containers, numbers, strings and tensors; refuses everything else."""

    def __init__(self, file: Any, storage: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        try:
            return _FUNCTIONS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, not tensors alone") from None

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _location, _count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it holds a {kind}, not tensors alone")
        data = np.frombuffer(self._storage(key), dtype=np.uint8).copy()
        return torch.from_numpy(data).view(dtype) if len(data) else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():
        # A stride of 0 would make any size of a few bytes.
        raise pickle.UnpicklingError(f"a tensor of the shape {size} is larger than its storage")
    return torch.as_strided(storage, size, stride, offset).clone()


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
