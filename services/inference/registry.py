"""The models in memory: loaded on demand and ahead, each version once, swapped whole, the least recently used dropped.

The registry on the volume is the truth. `get` answers from a table of pointers, reference → loaded version; a pointer
moves only when the new version is loaded and warm, so that what was served before goes on being served until then, and
for good if the new one is broken. Dropping a version forgets it here; the calls that use it keep it alive to their end.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from services.inference.loading import Served
from tandem.checkpoints.references import LATEST, ModelReference, parse_reference
from tandem.checkpoints.registry import Located, Registry
from tandem.errors import CheckpointCorrupt, NotFound, TandemError, TrainingFailed

MAX_LOADED = 8
# How long a failed load is remembered: a broken checkpoint must not be read anew for each call.
FAILURE_MEMORY_S = 10.0

log = logging.getLogger("tandem.inference.registry")

Key = tuple[Path, str | None]
Loader = Callable[[Located], Awaitable[Served]]


class ServingRegistry:
    """What is loaded, and which reference leads to it. Lives on one event loop; `load` does the slow part elsewhere."""

    def __init__(self, registry: Registry, load: Loader, max_loaded: int = MAX_LOADED) -> None:
        self.registry = registry
        self._load = load
        self._max_loaded = max_loaded
        self._loaded: OrderedDict[Key, Served] = OrderedDict()
        self._loading: dict[Key, asyncio.Task[Served]] = {}
        self._failed: dict[Key, tuple[float, TandemError]] = {}
        self._pointers: dict[ModelReference, Served] = {}
        # What was last said of a model that can't be followed, so that it is said once.
        self._damaged: dict[ModelReference, str] = {}

    async def get(self, reference: str) -> Served:
        """Return the version that `reference` names, loaded and warm.

        Raises InvalidReference, ModelNotFound, RunNotFound, or CheckpointCorrupt where it can't be loaded and there is
        no older one to take its place.
        """
        parsed = parse_reference(reference)
        if not isinstance(parsed, ModelReference):
            # A run's best moves with each epoch, so it is looked up each time.
            return await self._loaded_version(await asyncio.to_thread(self.registry.resolve, reference))
        served = self._pointers.get(parsed)
        return await self._follow(parsed) if served is None else self._touch(served)

    def loaded_versions(self, name: str) -> tuple[int, ...]:
        """Return the versions of model `name` that are in memory, in order."""
        versions = (served.located.version for served in self._loaded.values())
        return tuple(sorted(version.version for version in versions if version and version.name == name))

    @property
    def has_failures(self) -> bool:
        """True if something could not be read or loaded; it may be mended, so the watch tries again."""
        return bool(self._failed or self._damaged)

    async def refresh(self) -> dict[str, bool]:
        """Follow the volume: load new versions ahead, move pointers; return model name → whether it can answer."""
        names = await asyncio.to_thread(self._newest_first)
        self._damaged = {reference: said for reference, said in self._damaged.items() if reference.name in names}
        for reference in list(self._pointers):
            if reference.version is None or reference.name not in names:
                await self._advance(reference)
        serving = {}
        for number, name in enumerate(names):
            ahead = number < self._max_loaded
            serving[name] = not ahead or await self._advance(ModelReference(name))
        return serving

    async def close(self) -> None:
        """Give up the loads that go on."""
        for task in list(self._loading.values()):
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)

    def _newest_first(self) -> list[str]:
        """Return the models by the age of their newest version, so that the newest are loaded ahead."""

        def published(name: str) -> str:
            try:
                return self.registry.versions(name)[-1].created_at
            except (TandemError, OSError):
                return ""

        return sorted(self.registry.names(), key=published, reverse=True)

    async def _advance(self, reference: ModelReference) -> bool:
        """Move the pointer of `reference` to what the volume says now; return whether it leads anywhere."""
        try:
            await self._follow(reference)
        except NotFound:
            self._pointers.pop(reference, None)
            self._damaged.pop(reference, None)
            return False
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one model, the others are followed
            self._say_once(reference, error)
            return reference in self._pointers
        self._damaged.pop(reference, None)
        return True

    def _say_once(self, reference: ModelReference, error: Exception) -> None:
        said = " ".join(str(error).split()) or type(error).__name__
        # A version that can't be loaded was logged when it failed.
        known = any(error is failure for _, failure in self._failed.values())
        if not known and self._damaged.get(reference) != said:
            trace = None if isinstance(error, TandemError) else error
            log.error("%s can't be followed: %s", _text(reference), said, exc_info=trace)
            self._damaged[reference] = said

    async def _follow(self, reference: ModelReference) -> Served:
        located = await asyncio.to_thread(self.registry.resolve, _text(reference))
        while True:
            try:
                served = await self._loaded_version(located)
            except (CheckpointCorrupt, TrainingFailed) as error:
                served = await self._stand_in(reference, error)
            # What was published during a long load is not to be put back by its end.
            before, located = located, await asyncio.to_thread(self.registry.resolve, _text(reference))
            if _key(located) == _key(before):
                break
        if _key(served.located) in self._loaded:
            self._pointers[reference] = served
        return served

    async def _stand_in(self, reference: ModelReference, error: TandemError) -> Served:
        """Return what goes on being served in place of a broken version, or raise `error`."""
        if reference.version is not None:
            raise error
        if (current := self._pointers.get(reference)) is not None:
            return current
        if reference.alias != LATEST:
            raise error
        for version in reversed(await asyncio.to_thread(self.registry.versions, reference.name)):
            try:
                older = replace(reference, version=version.version)
                return await self._loaded_version(await asyncio.to_thread(self.registry.resolve, _text(older)))
            except (CheckpointCorrupt, TrainingFailed):
                continue
        raise error

    async def _loaded_version(self, located: Located) -> Served:
        key = _key(located)
        if (served := self._loaded.get(key)) is not None:
            return self._touch(served)
        if (failure := self._failed.get(key)) is not None and time.monotonic() - failure[0] < FAILURE_MEMORY_S:
            raise failure[1]
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load_once(key, located))
        # Shielded: a caller who leaves must not end the load that others wait for.
        return await asyncio.shield(self._loading[key])

    async def _load_once(self, key: Key, located: Located) -> Served:
        started_at = time.monotonic()
        try:
            served = await self._load(located)
        except (CheckpointCorrupt, TrainingFailed) as error:
            if key not in self._failed:
                log.error("%s can't be loaded and is refused: %s", located.label, error)
            refusal = CheckpointCorrupt(f"{located.label} can't be served: {error}")
            self._failed[key] = (time.monotonic(), refusal)
            raise refusal from error
        finally:
            del self._loading[key]
        self._failed.pop(key, None)
        self._loaded[key] = served
        self._drop_least_recent()
        log.info("%s loaded (%s) in %.2f s", located.label, served.card.architecture, time.monotonic() - started_at)
        return served

    def _touch(self, served: Served) -> Served:
        if (key := _key(served.located)) in self._loaded:
            self._loaded.move_to_end(key)
        return served

    def _drop_least_recent(self) -> None:
        while len(self._loaded) > self._max_loaded:
            _, dropped = self._loaded.popitem(last=False)
            self._pointers = {
                reference: served for reference, served in self._pointers.items() if served is not dropped
            }
            log.info("%s dropped from memory: %d versions are the limit", dropped.located.label, self._max_loaded)


def _key(located: Located) -> Key:
    return located.checkpoint, located.digest


def _text(reference: ModelReference) -> str:
    if reference.version is not None:
        return f"{reference.name}:{reference.version}"
    return f"{reference.name}@{reference.alias}"
