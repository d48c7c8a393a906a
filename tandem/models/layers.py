"""The layers of a network as a table, and as the file `network.json` of a checkpoint. Free of torch."""

import json
from dataclasses import asdict, dataclass
from itertools import groupby

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tandem.errors import CheckpointCorrupt

# Sizes in order; what follows the batch size B is written with it: "B", "64B", "B+1".
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Layer:
    """One layer: a leaf module, or a module with parameters of its own.

    - `name` is that of the module in the network ("" the network itself), `type` its class.
    - `input` and `output` are the shapes of the tensors of its first call, nested tuples laid flat; empty where the
      module was not called (its parameters are used by the module around it).
    - `num_parameters` counts its own parameters, not those of modules inside it, and a parameter that an earlier layer
      has too not again: those are `num_shared`.
    - `num_calls` is how often one pass through the network calls it.
    """

    name: str
    type: str
    input: tuple[Shape, ...]
    output: tuple[Shape, ...]
    num_parameters: int
    num_shared: int = 0
    num_calls: int = 1

    __pydantic_config__ = ConfigDict(extra="forbid")


_LAYERS = TypeAdapter(list[Layer])


def total_parameters(layers: list[Layer]) -> int:
    """Return the number of parameters of the whole network, a shared one counted once."""
    return sum(layer.num_parameters for layer in layers)


def to_json(layers: list[Layer]) -> bytes:
    """Return `layers` as a JSON list, one line a layer."""
    lines = (json.dumps(asdict(layer), ensure_ascii=False) for layer in layers)
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def from_json(data: bytes) -> list[Layer]:
    """Read what `to_json` wrote; raise CheckpointCorrupt if `data` is something else."""
    try:
        return _LAYERS.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise CheckpointCorrupt(f"network.json is no table of layers: {where}: {first['msg']}") from error


def shapes_text(shapes: tuple[Shape, ...]) -> str:
    """Return shapes for a person: "(B,35,200) 2×(2,B,200)"; "–" where there are none."""
    parts = []
    for shape, same in groupby(shapes):
        times = len(list(same))
        text = "(" + ",".join(map(str, shape)) + ")"
        parts.append(f"{times}×{text}" if times > 1 else text)
    return " ".join(parts) or "–"
