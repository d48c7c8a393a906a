"""The registry on the volume: names, versions and aliases. Free of torch; files alone, so that Redis can be lost.

models/<name>/versions/0003.json     {"version", "kind", "run_id", "checkpoint", "sha256", "metrics", "created_at"}
              aliases.json           {"latest": 3, "best": 2, "production": 1, …}
              history.jsonl          one line for each change of an alias
              journal/               with an object store: the changes that all hosts agree on (`store.journal`)
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from tandem.checkpoints.card import quality
from tandem.checkpoints.files import list_checkpoints, read_pointer, step_directory, verify
from tandem.checkpoints.pins import pin
from tandem.checkpoints.references import ModelReference, RunReference, parse_reference
from tandem.checkpoints.store.journal import Behind, Change, Journal, ModelState
from tandem.checkpoints.store.objects import ObjectStore
from tandem.checkpoints.store.state import IsHere, check_common, everything, write_state
from tandem.checkpoints.store.transfer import download_checkpoint, find_stored
from tandem.checkpoints.version import Version, read_version, write_version
from tandem.errors import CheckpointCorrupt, Conflict, InvalidName, InvalidRequest, ModelNotFound, RunNotFound
from tandem.names import check_name
from tandem.volume import Volume, replace_json, volume_errors
from tandem.wire.limits import MAX_ALIASES

__all__ = ["ANYWHERE", "MOVED", "Located", "Registry", "Version", "check_alias", "check_kind", "describe"]

T = TypeVar("T")

# Aliases that the registry moves itself.
MOVED = ("latest", "best")
# Where an alias is expected that may be moved from wherever it is; no version has this number.
ANYWHERE = -1


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


class Registry:
    """Reads and changes the registry of one volume.

    Where the volume shares an object store, each change is made there first, so that all hosts agree on it; it raises
    StoreUnavailable where the store is away, and nothing has changed then. `is_here` says which versions of other hosts
    the volume shows.
    """

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

    def publish(self, name: str, kind: str, run_id: str, checkpoint: Path, metrics: dict[str, float]) -> Version:
        """Register `checkpoint` as the next version of model `name` and move `latest` (and `best`) to it.

        Publishing the same checkpoint of the same run again returns the version that it has. `best` goes to the
        version with the highest val_acc1, or the lowest val_loss of a language model. The checkpoint is verified, and
        pinned so that its run keeps it. Raises Conflict if the name is that of a model of another kind,
        CheckpointCorrupt if a file of the checkpoint is damaged, ModelNotFound if it is gone.
        """
        directory = self.volume.model(name)
        with volume_errors(directory), self._locked(directory):
            return self._agreed(directory, lambda: self._publish(directory, kind, run_id, checkpoint, metrics))

    def _publish(self, directory: Path, kind: str, run_id: str, checkpoint: Path, metrics: dict[str, float]) -> Version:
        name, relative = directory.name, str(checkpoint.relative_to(self.volume.home))
        existing = sorted(self._known(directory).versions.values(), key=lambda version: version.version)
        check_kind(name, existing[-1].kind if existing else kind, kind)
        for version in existing:
            if (version.run_id, version.checkpoint) == (run_id, relative):
                pin(checkpoint, "model", f"{name}:{version.version}")
                if version is existing[-1]:
                    # Whoever wrote it may have been killed before the aliases moved.
                    self._change(directory, _to_newest(existing), f"run {run_id}")
                return version
        number = existing[-1].version + 1 if existing else 1
        digest = verify(checkpoint)
        pin(checkpoint, "model", f"{name}:{number}")
        version = Version(name, number, kind, run_id, relative, digest, metrics, _now())
        self._change(directory, _to_newest([*existing, version]), f"run {run_id}", new=(version,))
        return version

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        by: str,
        expected: int | None = ANYWHERE,
        details: Mapping[str, Any] | None = None,
    ) -> int | None:
        """Point `alias` of model `name` at `version`; return where it pointed before, None for nowhere.

        `by` says who for the history, and `details` what else. Raises InvalidRequest for an alias that the system moves
        or a name that is not allowed, ModelNotFound, VolumeUnavailable; Conflict where there are too many, or where the
        alias is no longer where it is `expected` (None: nowhere).
        """
        check_alias(alias)
        return self._changing(name, lambda: self._set_alias(name, alias, version, by, expected, details))

    def _set_alias(
        self, name: str, alias: str, version: int, by: str, expected: int | None, details: Mapping[str, Any] | None
    ) -> int | None:
        directory = self.volume.model(name)
        known = self._known(directory)
        if version not in known.versions:
            there = ", ".join(map(str, sorted(known.versions)))
            raise ModelNotFound(f"model {name!r} has no version {version} (there: {there})")
        before = known.aliases
        if alias not in before and len(before) >= MAX_ALIASES:
            raise Conflict(f"model {name!r} has {len(before)} aliases, which is the limit: delete one first")
        if expected not in (ANYWHERE, before.get(alias)):
            now = f"is {name}:{before[alias]}" if alias in before else "is gone"
            raise Conflict(f"{name}@{alias} {now} by now: somebody else has moved it; look again, and try again")
        self._change(directory, {alias: version}, by, details)
        return before.get(alias)

    def delete_alias(self, name: str, alias: str, by: str) -> int:
        """Take `alias` of model `name` away; return where it pointed. Raises what `set_alias` does."""
        check_alias(alias)

        def delete() -> int:
            directory = self.volume.model(name)
            before = self._known(directory).aliases
            if alias not in before:
                raise ModelNotFound(f"model {name!r} has no alias {alias!r}")
            self._change(directory, {alias: None}, by)
            return before[alias]

        return self._changing(name, delete)

    def note(self, name: str, entry: Mapping[str, Any]) -> None:
        """Add a line to the history of model `name`, of a decision that moved nothing; raise what `set_alias` does."""

        def note() -> None:
            directory = self.volume.model(name)
            self._record(directory, (), self._known(directory).aliases, [{"at": _now(), **entry}])

        self._changing(name, note)

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

    def _changing(self, name: str, change: Callable[[], T]) -> T:
        """Make a change to a model that is there; a wrong name is to leave no directory behind."""
        if self._journal is None or name not in self._journal.names():
            self.versions(name)
        directory = self.volume.model(name)
        with volume_errors(directory), self._locked(directory):
            return self._agreed(directory, change)

    def _agreed(self, directory: Path, change: Callable[[], T]) -> T:
        """Make a change to what all hosts agree on: once more where another was quicker."""
        while True:
            self._catch_up(directory)
            try:
                return change()
            except Behind:
                continue

    def _catch_up(self, directory: Path) -> bool:
        if self._journal is None:
            return False
        self._journal.pull(directory)
        state = self._journal.read(directory)
        if state is None:
            return False
        check_common(directory, state)
        return write_state(directory, state, self._is_here)

    def _known(self, directory: Path) -> ModelState:
        """Return what is known of a model: by the journal, or where there is none by its files."""
        if self._journal is not None and (state := self._journal.read(directory)) is not None:
            return state
        name = directory.name
        versions = self.versions(name) if name in self.names() else []
        return ModelState({each.version: each for each in versions}, self.aliases(name), ())

    def _change(
        self,
        directory: Path,
        moves: Mapping[str, int | None],
        reason: str,
        details: Mapping[str, Any] | None = None,
        new: Sequence[Version] = (),
    ) -> None:
        """Write where `moves` lead (None: nowhere), and a line of history for each that was elsewhere."""
        before = self._known(directory).aliases
        after = {alias: number for alias, number in {**before, **moves}.items() if number is not None}
        if after == before and not new:
            return
        changed = {alias: number for alias, number in moves.items() if before.get(alias) != number}
        basis = {"at": _now(), "by": reason, **(details or {})}
        lines = [
            {"alias": alias, "from": before.get(alias), "to": number, **basis} for alias, number in changed.items()
        ]
        self._record(directory, new, after, lines)

    def _record(
        self, directory: Path, new: Sequence[Version], aliases: Mapping[str, int], lines: list[dict[str, Any]]
    ) -> None:
        if self._journal is not None:
            self._journal.append(directory, self._with_what_was(directory, new, aliases, lines))
            self._catch_up(directory)
            return
        for version in new:
            write_version(directory, version)
        if aliases != self.aliases(directory.name):
            replace_json(directory / "aliases.json", dict(aliases))
        _append(directory, lines)

    def _with_what_was(
        self, directory: Path, new: Sequence[Version], aliases: Mapping[str, int], lines: list[dict[str, Any]]
    ) -> Change:
        """Return the change; the first one brings along what the volume had before there was a store."""
        assert self._journal is not None
        if self._journal.read(directory) is not None:
            return Change(tuple(new), dict(aliases), tuple(lines))
        versions = self.versions(directory.name) if directory.name in self.names() else []
        return Change((*versions, *new), dict(aliases), (*self.history(directory.name), *lines))

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


def check_alias(alias: str) -> None:
    """Raise InvalidRequest unless `alias` may be set by hand."""
    check_name(alias, "alias")
    if alias in MOVED:
        raise InvalidRequest(
            f"alias {alias!r} moves by itself as versions are published: take another name, such as production",
            field="alias",
        )


def check_kind(name: str, there: str, wanted: str) -> None:
    """Raise Conflict if model `name`, which is of kind `there`, is to get a version of another kind."""
    if there != wanted:
        raise Conflict(
            f"model {name!r} is a {there.replace('_', ' ')}; give the {wanted.replace('_', ' ')} another --name"
        )


def describe(registry: Registry, name: str) -> dict[str, Any]:
    """Return what `models list --json` says of model `name`."""
    versions = registry.versions(name)
    return {
        "name": name,
        "kind": versions[-1].kind,
        "latest": versions[-1].version,
        "aliases": registry.aliases(name),
        "versions": [version.version for version in versions],
        "metrics": versions[-1].metrics,
    }


def _is_name(name: str) -> bool:
    try:
        check_name(name, "model")
    except InvalidName:
        return False
    return True


def _to_newest(versions: Sequence[Version]) -> dict[str, int]:
    """Return where `latest` and `best` lead, given all versions in order."""
    best = max(versions, key=lambda version: quality(version.kind, version.metrics))
    return {"latest": versions[-1].version, "best": best.version}


def _append(directory: Path, entries: list[dict[str, Any]]) -> None:
    with open(directory / "history.jsonl", "ab+") as file:
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        # A crash may have cut the last line short, which would take the next one along.
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            lines = "\n" + lines
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
