"""The registry on the volume: names, versions and aliases. Free of torch; files alone, so that Redis can be lost.

models/<name>/versions/0003.json     {"version", "kind", "run_id", "checkpoint", "sha256", "metrics", "created_at"}
              aliases.json           {"latest": 3, "best": 2, "production": 1, …}
              history.jsonl          one line for each change of an alias
              journal/               with an object store: the changes that all hosts agree on (`store.journal`)
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tandem.checkpoints.card import quality
from tandem.checkpoints.files import verify
from tandem.checkpoints.pins import pin
from tandem.checkpoints.registry_reader import Located, RegistryReader
from tandem.checkpoints.store.journal import Behind, Change, ModelState
from tandem.checkpoints.version import Version, write_version
from tandem.errors import Conflict, InvalidRequest, ModelNotFound
from tandem.names import check_name
from tandem.volume import replace_json, volume_errors
from tandem.wire.limits import MAX_ALIASES

__all__ = ["ANYWHERE", "MOVED", "Located", "Registry", "Version", "check_alias", "check_kind", "describe"]

T = TypeVar("T")

# Aliases that the registry moves itself.
MOVED = ("latest", "best")
# Where an alias is expected that may be moved from wherever it is; no version has this number.
ANYWHERE = -1


class Registry(RegistryReader):
    """Reads and changes the registry of one volume.

    Where the volume shares an object store, each change is made there first, so that all hosts agree on it; it raises
    StoreUnavailable where the store is away, and nothing has changed then.
    """

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
