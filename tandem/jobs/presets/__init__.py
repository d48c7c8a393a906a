"""Presets: named sets of values for a training job's spec, each a file beside this one."""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any, Literal

_SUFFIX = ".toml"

Kind = Literal["train_classifier", "train_language_model"]


@cache
def preset_names(kind: Kind) -> tuple[str, ...]:
    """Return the names of the presets for jobs of `kind`, sorted."""
    names = (entry.name.removesuffix(_SUFFIX) for entry in files(__name__).iterdir() if entry.name.endswith(_SUFFIX))
    return tuple(sorted(name for name in names if _read(name)["kind"] == kind))


def load_preset(name: str) -> dict[str, Any]:
    """Return the values of preset `name`, by the fields of its job's spec."""
    return {field: value for field, value in _read(name).items() if field != "kind"}


@cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files(__name__) / f"{name}{_SUFFIX}").read_text("utf-8"))
