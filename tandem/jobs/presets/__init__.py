"""Presets: named sets of values for a classifier's job spec, each a file beside this one."""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

_SUFFIX = ".toml"


@cache
def preset_names() -> tuple[str, ...]:
    """Return the names of the presets, sorted."""
    names = (entry.name for entry in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def load_preset(name: str) -> dict[str, Any]:
    """Return the values of preset `name`, by the fields of `tandem.jobs.spec.ClassifierJob`."""
    return tomllib.loads((files(__name__) / f"{name}{_SUFFIX}").read_text("utf-8"))
