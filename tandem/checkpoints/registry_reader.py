"""Reading the registry on the volume, and keeping it in step with the other hosts' where there is an object store."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tandem.checkpoints.files import list_checkpoints, read_pointer, step_directory
from tandem.checkpoints.references import ModelReference, RunReference, parse_reference
from tandem.checkpoints.store.journal import Journal
from tandem.checkpoints.store.objects import ObjectStore
from tandem.checkpoints.store.state import IsHere, check_common, everything, write_state
from tandem.checkpoints.store.transfer import download_checkpoint, find_stored
from tandem.checkpoints.version import Version, read_version
from tandem.errors import CheckpointCorrupt, InvalidName, ModelNotFound, RunNotFound
from tandem.names import check_name
from tandem.volume import Volume, volume_errors

_ALIASES = TypeAdapter(dict[str, int])


@dataclass(frozen=True)
class Located:
    """Where a reference leads: a checkpoint directory, and the version it is, if any."""

    checkpoint: Path
    digest: str | None
    run_id: str
    version: Version | None

    @property
    def label(self) -> str:
        """How a person names it: name:version, or run:id/step."""
        if self.version is not None:
            return f"{self.version.name}:{self.version.version}"
        return f"run:{self.run_id}/{int(self.checkpoint.name.removeprefix('step-'))}"


class RegistryReader:
    """Reads the registry of one volume. `is_here` says which versions of other hosts the volume shows."""

    def __init__(self, volume: Volume, is_here: IsHere = everything) -> None:
        self.volume, self._is_here = volume, is_here
        self._journal = None if volume.store is None else Journal(ObjectStore(volume.store))

    def names(self) -> list[str]:
        """Return the models that have a version, sorted."""
        if not self.volume.models.is_dir():
            return []
        found = {path.parent.parent.name for path in self.volume.models.glob("*/versions/[0-9]*.json")}
        # A directory that was put there by hand can't be asked for by its name.
        return sorted(name for name in found if _is_name(name))

    def versions(self, name: str) -> list[Version]:
        """Return the versions of model `name`, oldest first; raise ModelNotFound if it has none."""
        paths = sorted((self.volume.model(name) / "versions").glob("[0-9]*.json"))
        versions = sorted((read_version(path) for path in paths), key=lambda version: version.version)
        if not versions:
            known = ", ".join(self.names()) or "none yet"
            raise ModelNotFound(f"no model {name!r} in the registry (there: {known})")
        return versions

    def aliases(self, name: str) -> dict[str, int]:
        """Return alias → version of model `name`; raise CheckpointCorrupt if its file is damaged."""
        path = self.volume.model(name) / "aliases.json"
        try:
            return _ALIASES.validate_json(path.read_bytes(), strict=True)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointCorrupt(f"{path} can't be read as a model's aliases") from error

    def resolve(self, reference: str) -> Located:
        """Find what `reference` names; raise InvalidReference, ModelNotFound or RunNotFound.

        A version of which the checkpoint is only in the store is fetched, which raises what `download_checkpoint` does.
        """
        parsed = parse_reference(reference)
        if isinstance(parsed, RunReference):
            return self._locate_run(parsed)
        located = self._locate_version(parsed)
        if self._journal is not None and located.digest is not None and not located.checkpoint.is_dir():
            stored = find_stored(self._journal.store, located.run_id, located.checkpoint.name, located.digest)
            download_checkpoint(self._journal.store, stored, located.checkpoint, located.digest)
        return located

    def catch_up_all(self) -> None:
        """Read what other hosts have changed, if there is an object store; raise what `catch_up` does."""
        for name in self._journal.names() if self._journal is not None else ():
            self.catch_up(name)

    def catch_up(self, name: str) -> bool:
        """Read what other hosts have changed of model `name`; return whether the volume says something new.

        Raises StoreUnavailable, and Conflict where the volume has a model of its own by this name.
        """
        directory = self.volume.model(name)
        with volume_errors(directory), self._locked(directory):
            return self._catch_up(directory)

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return the history of model `name`, oldest first; lines that a crash has cut short are passed over."""
        entries = []
        try:
            lines = (self.volume.model(name) / "history.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
        return entries

    def _catch_up(self, directory: Path) -> bool:
        if self._journal is None:
            return False
        self._journal.pull(directory)
        state = self._journal.read(directory)
        if state is None:
            return False
        check_common(directory, state)
        return write_state(directory, state, self._is_here)

    @contextmanager
    def _locked(self, directory: Path) -> Iterator[None]:
        """Let one process at a time change a model; the kernel drops the lock with its holder."""
        (directory / "versions").mkdir(parents=True, exist_ok=True)
        with open(directory / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _locate_version(self, reference: ModelReference) -> Located:
        # Aliases first: a version is written before they move to it, so that the versions read afterwards have it.
        aliases = {} if reference.version is not None else self.aliases(reference.name)
        versions = {version.version: version for version in self.versions(reference.name)}
        number = reference.version
        if number is None:
            number = aliases.get(reference.alias)
            if number is None and reference.alias == "latest":
                number = max(versions)
            if number is None:
                raise ModelNotFound(f"model {reference.name!r} has no alias {reference.alias!r}")
        if number not in versions:
            there = ", ".join(str(each) for each in versions)
            raise ModelNotFound(f"model {reference.name!r} has no version {number} (there: {there})")
        version = versions[number]
        return Located(self.volume.home / version.checkpoint, version.sha256, version.run_id, version)

    def _locate_run(self, reference: RunReference) -> Located:
        run = self.volume.run(reference.run_id)
        if not run.is_dir():
            raise RunNotFound(f"no run {reference.run_id!r} on the volume; 'tandem runs list' shows them")
        if reference.step is not None:
            checkpoint: Path | None = step_directory(run, reference.step)
        else:
            checkpoint = read_pointer(run, "best") or read_pointer(run, "latest")
        if checkpoint is None or not checkpoint.is_dir():
            steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in list_checkpoints(run)) or "none yet"
            raise ModelNotFound(f"run {reference.run_id} has no such checkpoint (steps there: {steps})")
        return Located(checkpoint, None, reference.run_id, None)


def _is_name(name: str) -> bool:
    try:
        check_name(name, "model")
    except InvalidName:
        return False
    return True
