"""What changes with the models, told to those who watch: the volume by comparing looks at it, the memory as it happens.

A watcher has all models first, then each change. What it has not read yet is bounded: one that falls too far behind
gets all models anew in place of what it missed. All is on one event loop.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tandem.checkpoints.references import LATEST
from tandem.checkpoints.registry import Located, Registry, describe
from tandem.errors import ModelNotFound, QueueFull, TandemError, Unavailable
from tandem.wire.limits import MAX_CHANGES, MAX_WATCHERS
from tandem.wire.results import ChangeKind, ModelChange, ModelInfo, ModelsSnapshot

# What `describe` says of each model.
Documents = Mapping[str, dict[str, Any]]


def describe_all(registry: Registry) -> Documents:
    """Return what the volume says of every model, by name; one whose files are damaged is left out."""
    documents = {}
    for name in registry.names():
        try:
            documents[name] = describe(registry, name)
        except TandemError:
            continue
    return documents


def differences(before: Documents, after: Documents) -> Iterator[ModelChange]:
    """Yield what happened on the volume from `before` to `after`: new versions, then the aliases that lead to them."""
    nothing: dict[str, Any] = {"versions": [], "aliases": {}}
    for name in sorted({*before, *after}):
        old, new = before.get(name, nothing), after.get(name, nothing)
        for version in sorted(set(new["versions"]) - set(old["versions"])):
            yield ModelChange("published", name, version)
        yield from _alias_changes(name, old["aliases"], new["aliases"])
        for version in sorted(set(old["versions"]) - set(new["versions"])):
            yield ModelChange("withdrawn", name, version)


def _alias_changes(name: str, old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[ModelChange]:
    for alias in sorted({*old, *new}):
        version, previous = new.get(alias, 0), old.get(alias, 0)
        if version != previous:
            kind: ChangeKind = "alias_set" if version else "alias_deleted"
            yield ModelChange(kind, name, version, alias, previous)


class _Watcher:
    """What one caller has still to be told."""

    def __init__(self, max_changes: int) -> None:
        self._max_changes = max_changes
        self.wake = asyncio.Event()
        self.pending: deque[ModelChange] = deque()
        # All models are to come first; they have what happens until then.
        self.is_stale = True

    def push(self, change: ModelChange) -> None:
        if not self.is_stale:
            self.pending.append(change)
        if len(self.pending) > self._max_changes:
            self.pending.clear()
            self.is_stale = True
        self.wake.set()


class Changes:
    """The models as they were last seen, and who watches them. `look` is for the volume, `tell` for the memory."""

    def __init__(
        self,
        registry: Registry,
        max_watchers: int = MAX_WATCHERS,
        max_changes: int = MAX_CHANGES,
        loaded_bytes: Callable[[str], int] = lambda _: 0,
    ) -> None:
        self._registry, self._loaded_bytes = registry, loaded_bytes
        self._max_watchers, self._max_changes = max_watchers, max_changes
        self._documents: Documents | None = None
        self._loaded: dict[str, set[int]] = {}
        self._failed: dict[str, dict[int, str]] = {}
        self._out_of_service: set[str] = set()
        self._watchers: set[_Watcher] = set()
        self._looking = asyncio.Lock()
        self._closed = False

    async def look(self) -> None:
        """Read what the volume says now, and tell what is new of it."""
        # One at a time: an older look must not come after a newer one.
        async with self._looking:
            after = await asyncio.to_thread(describe_all, self._registry)
            before, self._documents = self._documents, after
            for name, failed in self._failed.items():
                known = after[name]["versions"] if name in after else ()
                self._failed[name] = {version: why for version, why in failed.items() if version in known}
            for change in differences(before or {}, after):
                self._broadcast(change)

    def tell(self, kind: ChangeKind, located: Located, reason: str = "") -> None:
        """Note that a version was loaded, unloaded, or failed to load; a checkpoint of a run is no version."""
        if located.version is None:
            return
        name, version = located.version.name, located.version.version
        loaded, failed = self._loaded.setdefault(name, set()), self._failed.setdefault(name, {})
        if kind == "failed" and failed.get(version) == reason:
            # It is tried again every few seconds.
            return
        if kind == "failed":
            failed[version] = reason
        else:
            failed.pop(version, None)
            (loaded.add if kind == "loaded" else loaded.discard)(version)
        if kind != "unloaded":
            self._out_of_service.discard(name)
        self._broadcast(ModelChange(kind, name, version, reason=reason))

    def unloaded(self, name: str) -> None:
        """Note that model `name` was taken out of service."""
        self._out_of_service.add(name)
        self._broadcast(ModelChange("unloaded", name, reason="it was taken out of service"))

    def failures(self, name: str) -> Mapping[int, str]:
        """Return the versions of model `name` that could not be loaded the last time, with the reasons."""
        return self._failed.get(name, {})

    def info(self, document: dict[str, Any]) -> ModelInfo:
        """Return what there is to say of the model that `document` describes."""
        name = document["name"]
        return ModelInfo(
            name=name,
            kind=document["kind"],
            latest=document["latest"],
            aliases=document["aliases"],
            versions=tuple(document["versions"]),
            loaded=tuple(sorted(self._loaded.get(name, ()))),
            failed=dict(self.failures(name)),
            out_of_service=name in self._out_of_service,
            loaded_bytes=self._loaded_bytes(name),
        )

    def model(self, name: str) -> ModelInfo:
        """Return what there is to say of model `name`; raise ModelNotFound if it was not there at the last look."""
        document = (self._documents or {}).get(name)
        if document is None:
            raise ModelNotFound(f"no model {name!r} in the registry")
        return self.info(document)

    def leads(self, name: str, alias: str) -> bool:
        """Return whether `alias` of model `name` was there at the last look; before the first one all are."""
        if self._documents is None or name not in self._documents:
            return self._documents is None
        return alias == LATEST or alias in self._documents[name]["aliases"]

    async def watch(self) -> AsyncGenerator[ModelsSnapshot | ModelChange, None]:
        """Yield all models, then each change; raise QueueFull with too many watchers, Unavailable once closed."""
        if len(self._watchers) >= self._max_watchers:
            raise QueueFull(f"{len(self._watchers)} callers watch the models, which is the limit; try again later")
        watcher = _Watcher(self._max_changes)
        self._watchers.add(watcher)
        try:
            if self._documents is None:
                # Also where there is no volume yet that could be followed.
                await self.look()
            while not self._closed:
                if watcher.is_stale and self._documents is not None:
                    watcher.is_stale = False
                    yield ModelsSnapshot(tuple(map(self.info, self._documents.values())))
                elif watcher.pending:
                    yield watcher.pending.popleft()
                else:
                    watcher.wake.clear()
                    await watcher.wake.wait()
            raise Unavailable("the server is stopping; watch again when it is back")
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        """End those who watch."""
        self._closed = True
        for watcher in self._watchers:
            watcher.wake.set()

    def _broadcast(self, change: ModelChange) -> None:
        for watcher in self._watchers:
            watcher.push(change)


def with_public_reasons(
    update: ModelsSnapshot | ModelChange, public: Callable[[str], str]
) -> ModelsSnapshot | ModelChange:
    """Return `update` with each reason as `public` has it: without what callers are not to see."""
    if isinstance(update, ModelChange):
        return replace(update, reason=public(update.reason) if update.reason else "")
    return ModelsSnapshot(tuple(with_public_failures(model, public) for model in update.models))


def with_public_failures(model: ModelInfo, public: Callable[[str], str]) -> ModelInfo:
    """Return `model` with its reasons as `public` has them."""
    return replace(model, failed={version: public(reason) for version, reason in model.failed.items()})
