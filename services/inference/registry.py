"""Which reference leads to which version in memory: loaded on demand and ahead, swapped whole, dropped when superseded.

The registry on the volume is the truth. `get` answers from a table of pointers, reference → loaded version; a pointer
moves only when the new version is loaded and warm, so that what was served before goes on being served until then, and
for good if the new one is broken. While the volume is gone nothing moves.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from services.inference.admission import Lobby
from services.inference.changes import Changes
from services.inference.following import Following, Place
from services.inference.loading import Served
from services.inference.memory import MemoryBudget
from services.inference.residents import AHEAD, CALLER, FAILURE_MEMORY_S, NUM_LOADERS, Residents, Wiring, key_of
from tandem.checkpoints.references import LATEST, ModelReference, parse_reference
from tandem.checkpoints.registry import Located, Registry
from tandem.errors import (
    CheckpointCorrupt,
    InvalidRequest,
    MemoryFull,
    ModelTooLarge,
    ModelUnloaded,
    NotFound,
    TandemError,
    TrainingFailed,
    VolumeUnavailable,
)

__all__ = ["FAILURE_MEMORY_S", "NUM_LOADERS", "ServingRegistry", "Wiring"]

# Why a version is not served although it is there; an older one takes its place.
_REFUSED = (CheckpointCorrupt, TrainingFailed, ModelTooLarge)

log = logging.getLogger("tandem.inference.registry")

# Told the name of a model, and whether it answers; None where it is gone.
OnAnswers = Callable[[str, bool | None], Awaitable[None]]


class ServingRegistry:
    """What is served, and which reference leads to it. Lives on one event loop; the slow part is done elsewhere."""

    def __init__(self, registry: Registry, wiring: Wiring, budget: MemoryBudget) -> None:
        self.registry = registry
        self.budget = budget
        self.changes = Changes(registry, loaded_bytes=self.loaded_bytes)
        self._residents = Residents(
            wiring, budget, self._is_wanted, self._forget, registry.volume.models.is_dir, self.changes.tell
        )
        self._pointers: dict[ModelReference, Served] = {}
        # What was last said of a model that can't be followed, so that it is said once.
        self._damaged: dict[ModelReference, str] = {}
        # Set when it should look at the volume, or tell who can answer, at once.
        self.wake = asyncio.Event()
        # Models that an operator has unloaded.
        self._unloaded: set[str] = set()
        self._lobby = Lobby()
        self._following = Following(self._follow_now, NUM_LOADERS)
        # The models of the last look, and which of them answer, as far as they were followed.
        self._names: frozenset[str] = frozenset()
        self._answers: dict[str, bool] = {}
        # Told at once of each of them.
        self.on_answers: OnAnswers = _to_nobody

    async def get(self, reference: str) -> Served:
        """Return the version that `reference` names, loaded and warm.

        Raises InvalidReference, ModelNotFound, RunNotFound, ModelUnloaded; QueueFull where too many wait for loads;
        VolumeUnavailable where it is not in memory and can't be read; what `Residents.obtain` does where it can't be
        loaded and no older one takes its place.
        """
        parsed = parse_reference(reference)
        if not isinstance(parsed, ModelReference):
            # A run's best moves with each epoch, so it is looked up each time.
            with self._lobby.wait():
                return self._residents.touch(await self._residents.obtain(await self._locate(reference)))
        if parsed.name in self._unloaded:
            raise ModelUnloaded(f"model {parsed.name} was unloaded on this server; load it to use it again")
        if (served := self._pointers.get(parsed)) is None:
            with self._lobby.wait():
                served = await self._follow(parsed, CALLER)
        return self._residents.touch(served)

    async def get_ahead(self, reference: str) -> Served:
        """Return what `get` does of a version of the registry, loaded into free room alone: nothing makes way for it,
        and it makes way for all that callers ask for. It stays with the version that `reference` names now.

        Raises what `get` does, MemoryFull where there is no room, and InvalidRequest for a checkpoint of a run.
        """
        version = (await self._locate(reference)).version
        if version is None:
            raise InvalidRequest(
                f"{reference} is a checkpoint of a run; name a version, as NAME:VERSION", field="model"
            )
        if version.name in self._unloaded:
            raise ModelUnloaded(f"model {version.name} was unloaded on this server; load it to use it again")
        pinned = ModelReference(version.name, version.version)
        return self._pointers.get(pinned) or await self._follow(pinned, AHEAD)

    def pointed(self, reference: ModelReference) -> Served | None:
        """Return what answers calls of `reference` now; None where the next one would have to load it."""
        return self._pointers.get(reference)

    def has(self, served: Served) -> bool:
        """Return whether `served` is in memory, and not only kept alive by those who hold it."""
        return served in self._residents

    async def check_fits(self, served: Served, reference: str) -> None:
        """Raise ModelTooLarge if `reference` can't be in memory beside `served`, which a call holds while it asks."""
        located = await self._locate(reference)
        if located.checkpoint != served.located.checkpoint:
            await self._residents.check_fits(served, located)

    async def load(self, reference: str) -> Served:
        """Put the model that `reference` names back into service, and load the version now. Raises what `get` does."""
        parsed = parse_reference(reference)
        # It is asked for by hand: something may have been mended since it failed.
        self._residents.forget_failure(await self._locate(reference))
        if isinstance(parsed, ModelReference):
            self._unloaded.discard(parsed.name)
        try:
            served = await self.get(reference)
            if isinstance(parsed, ModelReference) and parsed == ModelReference(parsed.name):
                await self._note(parsed.name, answers=True)
            return served
        finally:
            self.wake.set()

    async def unload(self, name: str) -> None:
        """Take model `name` out of service and memory until `load`; calls that use it keep it alive to their end.

        Raises ModelNotFound if there is none.
        """
        await asyncio.to_thread(self.registry.versions, name)
        self._unloaded.add(name)
        for served in self.loaded():
            if _is_of(served, name):
                self._residents.drop(served, "it was unloaded")
        self.changes.unloaded(name)
        self.wake.set()
        await self._note(name, answers=False)

    async def follow(self, name: str) -> None:
        """Look at the volume now, and move the pointers of model `name` to what it says."""
        await self.changes.look()
        for reference in list(self._pointers):
            if reference.name == name and reference.version is None:
                await self._advance(reference)

    def is_unloaded(self, name: str) -> bool:
        """Say whether an operator has taken model `name` out of service."""
        return name in self._unloaded

    def loaded_versions(self, name: str) -> tuple[int, ...]:
        """Return the versions of model `name` that are in memory, in order."""
        versions = (served.located.version for served in self.loaded())
        return tuple(sorted(version.version for version in versions if version and version.name == name))

    def loaded_bytes(self, name: str) -> int:
        """Return the bytes that the versions of model `name` in memory take."""
        return sum(served.footprint.num_bytes for served in self.loaded() if _is_of(served, name))

    def loaded(self) -> tuple[Served, ...]:
        """Return what is in memory, the least recently used first."""
        return self._residents.all()

    @property
    def has_failures(self) -> bool:
        """True if something could not be read or loaded; it may be mended, so the watch tries again."""
        return bool(self._residents.has_failures or self._damaged)

    async def find_mended(self) -> bool:
        """Return whether the files of something that could not be loaded have changed since, once for each change."""
        return await self._residents.find_mended()

    async def refresh(self) -> dict[str, bool]:
        """Follow the volume to what it says now; raise and return what `begin_refresh` does."""
        return await (await self.begin_refresh())

    async def begin_refresh(self) -> Awaitable[dict[str, bool]]:
        """Begin to follow the volume: to load new versions ahead, and to move pointers, each model on its own.

        Returns what waits until all are there, and returns model name → whether it can answer. `on_answers` is told
        of each as soon as it is known. Raises VolumeUnavailable if the volume goes meanwhile; then nothing has moved.
        """
        names = await asyncio.to_thread(self._newest_first)
        if not names and self._pointers and not await asyncio.to_thread(self.registry.volume.models.is_dir):
            raise VolumeUnavailable("the shared volume is not there")
        await self.changes.look()
        self._residents.forget_old_failures()
        self._damaged = {reference: said for reference, said in self._damaged.items() if reference.name in names}
        await self._name(names)
        followed = [each for each in self._pointers if each.version is None or each.name not in self._names]
        # Those that answer first, then the newest; whatever needs room has it in this order.
        order = dict.fromkeys([*followed, *map(ModelReference, names)])
        return self._end_of([self._following.ask(reference) for reference in order])

    async def close(self) -> None:
        """Give up the loads that go on."""
        await self._following.close()
        await self._residents.close()

    async def _end_of(self, tasks: Sequence["asyncio.Task[None]"]) -> dict[str, bool]:
        # Not gathered: others wait for the same, and whoever leaves must not end it.
        if tasks:
            await asyncio.wait(tasks)
        return dict(self._answers)

    async def _name(self, names: Sequence[str]) -> None:
        """Note which models there are."""
        self._names = frozenset(names)
        for name in self._answers.keys() - self._names:
            del self._answers[name]
            await self.on_answers(name, None)

    async def _note(self, name: str, *, answers: bool) -> None:
        """Note whether a call of model `name` would be answered."""
        if name in self._names:
            self._answers[name] = answers
            await self.on_answers(name, answers)

    async def _follow_now(self, reference: ModelReference, place: Place) -> None:
        """Move the pointer of `reference`; of the newest version of a model, note whether it answers."""
        name = reference.name
        if reference != ModelReference(name):
            await self._advance(reference, place)
            return
        is_there = name not in self._unloaded and await self._advance(reference, place)
        # It may have been unloaded meanwhile.
        await self._note(name, answers=is_there and name not in self._unloaded)

    def _newest_first(self) -> list[str]:
        """Return the models by the age of their newest version, so that the newest are loaded ahead."""

        def published(name: str) -> str:
            try:
                return self.registry.versions(name)[-1].created_at
            except (TandemError, OSError):
                return ""

        return sorted(self.registry.names(), key=published, reverse=True)

    async def _advance(self, reference: ModelReference, place: Place | None = None) -> bool:
        """Move the pointer of `reference` to what the volume says now; return whether a call would be answered."""
        try:
            await self._follow_or_wait(reference, place)
        except NotFound:
            self._pointers.pop(reference, None)
            self._damaged.pop(reference, None)
            return False
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one model, the others are followed
            self._say_once(reference, error)
            return reference in self._pointers
        self._damaged.pop(reference, None)
        return True

    async def _follow_or_wait(self, reference: ModelReference, place: Place | None) -> None:
        """Follow `reference` as far as there is room; what does not fit in is loaded by its first caller."""
        current = self._pointers.get(reference)
        try:
            await self._follow(reference, self._residents.rank(current), place)
        except MemoryFull as error:
            if current is None:
                return
            if self._residents.is_busy(current) or self._residents.has_failed(await self._locate(_text(reference))):
                # It goes on answering: whoever waited for the new one would wait for its calls too, or in vain.
                raise
            self._residents.drop(current, f"a newer one does not fit beside it ({error})")
        else:
            return
        # Nobody is to hold on to it meanwhile.
        del current
        await self._follow_or_wait(reference, place)

    def _say_once(self, reference: ModelReference, error: Exception) -> None:
        said = " ".join(str(error).split()) or type(error).__name__
        # A version that can't be loaded was logged when it failed; how much is in use changes.
        key = type(error).__name__ if isinstance(error, MemoryFull) else said
        if not self._residents.has_said(error) and self._damaged.get(reference) != key:
            trace = None if isinstance(error, TandemError) else error
            log.error("%s can't be followed: %s", _text(reference), said, exc_info=trace)
            self._damaged[reference] = key

    async def _locate(self, reference: str) -> Located:
        """Find `reference` on the volume; raise VolumeUnavailable, not NotFound, where the volume itself is gone."""
        try:
            return await asyncio.to_thread(self.registry.resolve, reference)
        except (NotFound, CheckpointCorrupt) as error:
            volume = self.registry.volume
            lost = self._pointers and not await asyncio.to_thread(volume.models.is_dir)
            if lost or not await asyncio.to_thread(volume.home.is_dir):
                raise VolumeUnavailable(f"{reference} can't be found: the shared volume is not there") from error
            raise

    async def _follow(self, reference: ModelReference, rank: int, place: Place | None = None) -> Served:
        located = await self._locate(_text(reference))
        while True:
            try:
                served = await self._residents.obtain(located, rank, place)
            except _REFUSED as error:
                served = await self._stand_in(reference, rank, error, place)
            # What was published during a long load is not to be put back by its end.
            before, located = located, await self._locate(_text(reference))
            if key_of(located) == key_of(before):
                break
            self._drop_superseded(served)
        if served in self._residents:
            before_it, self._pointers[reference] = self._pointers.get(reference), served
            if before_it is not None:
                self._drop_superseded(before_it)
        return served

    def _drop_superseded(self, served: Served) -> None:
        """Drop a version that no reference leads to any more."""
        if all(served is not each for each in self._pointers.values()):
            self._residents.drop(served, "a newer one has its place")

    async def _stand_in(self, reference: ModelReference, rank: int, error: TandemError, place: Place | None) -> Served:
        """Return what goes on being served in place of a version that is refused, or raise `error`."""
        if reference.version is not None:
            raise error
        if (current := self._pointers.get(reference)) is not None:
            return current
        if reference.alias != LATEST:
            raise error
        for version in reversed(await asyncio.to_thread(self.registry.versions, reference.name)):
            try:
                older = replace(reference, version=version.version)
                return await self._residents.obtain(await self._locate(_text(older)), rank, place)
            except _REFUSED:
                continue
        raise error

    def _is_wanted(self, served: Served) -> bool:
        return not any(_is_of(served, name) for name in self._unloaded)

    def _forget(self, dropped: Served) -> None:
        self._pointers = {reference: served for reference, served in self._pointers.items() if served is not dropped}


async def _to_nobody(name: str, answers: bool | None) -> None:
    del name, answers


def _is_of(served: Served, name: str) -> bool:
    return served.located.version is not None and served.located.version.name == name


def _text(reference: ModelReference) -> str:
    if reference.version is not None:
        return f"{reference.name}:{reference.version}"
    return f"{reference.name}@{reference.alias}"
