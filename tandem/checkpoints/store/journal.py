"""The registry in the store: of each model a row of numbered changes, each created once and never altered.

A change holds all that follows from it: versions, where aliases lead, and lines of history. Whoever wants the next
number first reads those before it; of two that want the same one gets it, and the other reads again. So versions have
one number on all hosts, an alias moves from where its mover saw it, and no history is lost.

    models/<name>/00000012.json          in the store
    models/<name>/journal/00000012.json  on the volume, as far as it has been read
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from tandem.checkpoints.store.objects import ObjectStore
from tandem.checkpoints.version import Version
from tandem.errors import CheckpointCorrupt, Conflict
from tandem.volume import fsync_directory, replace_file, to_json


class Behind(Conflict):
    """Another host has made a change meanwhile; what was decided before is to be decided anew."""


@dataclass(frozen=True)
class Change:
    """One change of a model: versions that are new, all aliases after it, and its lines of history."""

    versions: tuple[Version, ...]
    aliases: dict[str, int]
    history: tuple[dict[str, Any], ...]
    # Tells whose change it is where an answer was lost.
    id: str = ""

    __pydantic_config__ = ConfigDict(extra="forbid")


_CHANGE = TypeAdapter(Change)


@dataclass(frozen=True)
class ModelState:
    """What all changes of a model come to."""

    versions: Mapping[int, Version]
    aliases: Mapping[str, int]
    history: tuple[dict[str, Any], ...]


class Journal:
    """The changes of all models in one store."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def names(self) -> list[str]:
        """Return the models that have changes."""
        return self.store.folders("models")

    def pull(self, directory: Path) -> bool:
        """Copy the changes of the model of `directory` that it has not; return whether there were any."""
        name, copies = directory.name, directory / "journal"
        known = {path.name for path in copies.glob("*.json")}
        there = [each.rpartition("/")[2] for each in self.store.sizes(f"models/{name}")]
        missing = [each for each in there if each not in known]
        if missing:
            copies.mkdir(parents=True, exist_ok=True)
        # In order: a crash in between leaves a beginning, never a gap.
        for file in missing:
            data = self.store.get(f"models/{name}/{file}")
            if data is None:
                break
            _parse(data, f"{self.store.address}/models/{name}/{file}")
            replace_file(copies / file, data)
        return bool(missing)

    def read(self, directory: Path) -> ModelState | None:
        """Return what the changes that were pulled come to; None where there is none."""
        paths = sorted((directory / "journal").glob("[0-9]*.json"))
        changes = [_parse(path.read_bytes(), str(path)) for path in paths]
        if not changes:
            return None
        versions = {version.version: version for change in changes for version in change.versions}
        return ModelState(versions, changes[-1].aliases, tuple(line for change in changes for line in change.history))

    def append(self, directory: Path, change: Change) -> None:
        """Make `change` the next after those that were pulled; raise Behind if another has that number."""
        copies = directory / "journal"
        copies.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.stem) for path in copies.glob("[0-9]*.json")]
        file = f"{max(numbers, default=0) + 1:08d}.json"
        named = Change(change.versions, change.aliases, change.history, secrets.token_hex(8))
        data = to_json(_CHANGE.dump_python(named, mode="json"))
        path = f"models/{directory.name}/{file}"
        # Created, and only the answer lost: the second try finds our own.
        if not self.store.create(path, data) and self.store.get(path) != data:
            raise Behind(f"model {directory.name!r} was changed by another host meanwhile; try again")
        replace_file(copies / file, data)
        fsync_directory(copies)


def _parse(data: bytes, where: str) -> Change:
    try:
        return _CHANGE.validate_python(json.loads(data))
    except ValueError as error:
        raise CheckpointCorrupt(f"{where} can't be read as a change of a model") from error
