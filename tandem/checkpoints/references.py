"""Model references: `name`, `name:version`, `name@alias`, `run:<run_id>[/step]`."""

import re
from dataclasses import dataclass

from tandem.errors import InvalidReference
from tandem.names import NAME_PATTERN

LATEST = "latest"

_RUN = re.compile(rf"run:(?P<run_id>{NAME_PATTERN})(?:/(?P<step>\d{{1,15}}))?")
_MODEL = re.compile(rf"(?P<name>{NAME_PATTERN})(?::(?P<version>\d{{1,9}})|@(?P<alias>{NAME_PATTERN}))?")


@dataclass(frozen=True)
class ModelReference:
    """A model by name and alias, or by name and version."""

    name: str
    version: int | None = None
    alias: str = LATEST


@dataclass(frozen=True)
class RunReference:
    """A checkpoint of a run; `step` None means its best, or its latest where it has no best."""

    run_id: str
    step: int | None = None


def parse_reference(text: str) -> ModelReference | RunReference:
    """Parse a model reference; raise InvalidReference with the forms there are."""
    if run := _RUN.fullmatch(text):
        return RunReference(run["run_id"], int(run["step"]) if run["step"] else None)
    if text != "run" and (model := _MODEL.fullmatch(text)):
        version = int(model["version"]) if model["version"] else None
        return ModelReference(model["name"], version, model["alias"] or LATEST)
    raise InvalidReference(
        f"{text[:80]!r} is no model reference: write name, name:version, name@alias or run:<run_id>[/step]",
        field="model",
    )
