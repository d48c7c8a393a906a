"""The versions in memory, each once: loaded within a budget, the least recently used dropped where room is needed.

A version is loaded with a rank, the time of its use: only what was used before that makes room for it. A caller's has
the highest, so that whatever fits at all is loaded; what is loaded ahead has none, and takes free room alone; a newer
version has that of the one it follows. What calls are using is dropped last, and counts until they have let go of it.
"""

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

from services.inference.following import Place
from services.inference.loading import Served
from services.inference.memory import MemoryBudget, return_to_system
from tandem.checkpoints.registry import Located
from tandem.errors import CheckpointCorrupt, MemoryFull, ModelTooLarge, TandemError, TrainingFailed, VolumeUnavailable
from tandem.sizes import format_size

# How long a failed load is remembered: a broken checkpoint must not be read anew for each call. Each further failure of
# the same files doubles it, so often at the most (320 s); files that change are tried at once.
FAILURE_MEMORY_S = 10.0
_MAX_DOUBLINGS = 5
# And how long it is known at all: what was withdrawn meanwhile is not waited for any more.
_FORGOTTEN_S = 600.0
# Models that are loaded at once: each takes a core, and several times its weights of memory.
NUM_LOADERS = 2
# How long a caller's load waits for calls to let go of what they use.
ROOM_WAIT_S = 10.0
COLLECT_EVERY_S = 1.0
RETRY_AFTER_S = 1.0

# Ranks: of what is loaded ahead, and of what a caller waits for.
AHEAD, CALLER = 0, 1 << 62

log = logging.getLogger("tandem.inference.registry")

Key = tuple[Path, str | None]
# What of a checkpoint's files changes when one of them does; None where they can't be seen.
Files = frozenset[tuple[str, int, int, int]] | None
Loader = Callable[[Located], Awaitable[Served]]


@dataclass(frozen=True)
class Wiring:
    """What the table asks of others: to load, what loading will need, and whether calls use a version."""

    load: Loader
    needed_bytes: Callable[[Located], int] = lambda _: 0
    is_busy: Callable[[Served], bool] = lambda _: False


@dataclass(eq=False, slots=True)
class _Entry:
    served: Served
    # When it was last asked for, in ticks; AHEAD for never.
    used: int


@dataclass(frozen=True)
class _Loading:
    task: "asyncio.Task[Served]"
    rank: int


@dataclass(frozen=True, slots=True)
class _Failure:
    """A load that failed."""

    # Not the error itself: it would keep all that the calls it was raised in held.
    said: str
    at: float
    # As they were when the load began.
    files: Files
    # In a row, of the same files; 0 where they have changed since.
    num_failures: int

    @property
    def is_over(self) -> bool:
        """True if it may be tried again."""
        if not self.num_failures:
            return True
        wait_s = FAILURE_MEMORY_S * 2.0 ** min(self.num_failures - 1, _MAX_DOUBLINGS)
        return time.monotonic() >= self.at + wait_s

    def differs(self, files: Files) -> bool:
        """Return whether `files` are others than those that failed."""
        return files is not None and files != self.files


class Residents:
    """Lives on one event loop. `is_wanted` is asked once a load is done; `on_drop` is told what is dropped; `tell` all
    that changes, with its reason."""

    def __init__(
        self,
        wiring: Wiring,
        budget: MemoryBudget,
        is_wanted: Callable[[Served], bool],
        on_drop: Callable[[Served], None],
        is_volume_there: Callable[[], bool],
        tell: Callable[[Literal["loaded", "unloaded", "failed"], Located, str], None] = lambda *_: None,
    ) -> None:
        self.budget = budget
        self._wiring = wiring
        self._is_wanted = is_wanted
        self._on_drop = on_drop
        self._is_volume_there = is_volume_there
        self._tell = tell
        self._entries: dict[Key, _Entry] = {}
        self._loading: dict[Key, _Loading] = {}
        self._failed: dict[Key, _Failure] = {}
        # Dropped, but not yet let go of by its calls.
        self._leaving: WeakValueDictionary[Key, Served] = WeakValueDictionary()
        # What a version of a model took when it was last loaded.
        self._took: dict[str, int] = {}
        self._tick = AHEAD
        # Loads that wait for room get it in turn.
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        budget.on_release = self._wake

    def __contains__(self, served: Served) -> bool:
        entry = self._entries.get(key_of(served.located))
        return entry is not None and entry.served is served

    def all(self) -> tuple[Served, ...]:
        """Return what is in memory, the least recently used first."""
        # By a copy: a scrape asks on a thread of its own.
        entries = list(self._entries.values())
        return tuple(entry.served for entry in sorted(entries, key=lambda entry: entry.used))

    def touch(self, served: Served) -> Served:
        """Note that `served` is asked for; return it."""
        if (entry := self._entries.get(key_of(served.located))) is not None:
            self._tick += 1
            entry.used = self._tick
        return served

    def rank(self, served: Served | None) -> int:
        """Return what a version may be loaded at that is to follow `served`."""
        entry = None if served is None else self._entries.get(key_of(served.located))
        return AHEAD if entry is None else entry.used

    def is_busy(self, served: Served) -> bool:
        """Return whether calls are using `served`."""
        return self._wiring.is_busy(served)

    @property
    def has_failures(self) -> bool:
        """True if something could not be loaded."""
        return bool(self._failed)

    def has_failed(self, located: Located) -> bool:
        """Return whether `located` could not be loaded the last time."""
        return key_of(located) in self._failed

    def has_said(self, error: Exception) -> bool:
        """Return whether `error` was logged when the load failed."""
        return any(str(error) == failure.said for failure in self._failed.values())

    def forget_failure(self, located: Located) -> None:
        """Let `located` be tried again at once."""
        self._failed.pop(key_of(located), None)

    def forget_old_failures(self) -> None:
        """Forget what failed long ago; it is tried, and said, again if somebody wants it."""
        oldest = time.monotonic() - _FORGOTTEN_S
        self._failed = {key: failure for key, failure in self._failed.items() if failure.at > oldest}

    async def find_mended(self) -> bool:
        """Let what failed be tried at once where its files have changed since; return whether some have, once."""
        before = dict(self._failed)
        files = await asyncio.to_thread(lambda: {key: _files(key[0]) for key in before})
        changed = [key for key, failure in before.items() if failure.differs(files[key])]
        for key in changed:
            if self._failed.get(key) is before[key]:
                self._failed[key] = replace(before[key], files=files[key], num_failures=0)
        return bool(changed)

    async def check_fits(self, served: Served, located: Located) -> None:
        """Raise ModelTooLarge if `located` does not fit into the budget beside `served`."""
        needed = await self._needed_bytes(located)
        if served.footprint.num_bytes + needed > self.budget.num_bytes:
            raise ModelTooLarge(
                f"{served.located.label} and {located.label} do not fit into memory together: they need about "
                f"{format_size(served.footprint.num_bytes + needed)}, and all models may take "
                f"{format_size(self.budget.num_bytes)} on this server: raise TANDEM_MODEL_MEMORY"
            )

    async def obtain(self, located: Located, rank: int = CALLER, place: Place | None = None) -> Served:
        """Return `located`, loaded once and warm; with a `place`, in its turn.

        Raises CheckpointCorrupt if it can't be loaded, ModelTooLarge if the budget does not hold it, and MemoryFull if
        nothing of a lower rank makes room: for a caller, nothing that its calls let go of within ROOM_WAIT_S.
        """
        self._loop = asyncio.get_running_loop()
        key = key_of(located)
        while True:
            if (entry := self._entries.get(key)) is not None:
                return entry.served
            failure = self._failed.get(key)
            if failure is not None and not failure.is_over and not await self._has_changed(key, failure):
                raise CheckpointCorrupt(failure.said)
            if key in self._entries:
                continue
            if (served := self._leaving.get(key)) is not None and not self._turn.locked() and self._is_wanted(served):
                # Its calls keep it alive anyway, and nobody waits for its room.
                del self._leaving[key]
                self._entries[key] = _Entry(served, rank if rank != CALLER else AHEAD)
                self._tell("loaded", located, "")
                return served
            loading = self._loading.get(key)
            if loading is None:
                if place is not None and not place.has_come:
                    # Not as a load that waits: a caller who comes meanwhile would wait with it.
                    await place.comes()
                    continue
                loading = self._begin(key, located, rank, place)
            elif place is not None:
                place.leave()
            try:
                # Shielded: a caller who leaves must not end the load that others wait for.
                return await asyncio.shield(loading.task)
            except MemoryFull:
                if loading.rank >= rank:
                    raise
            finally:
                # An error that leads to this frame, which leads to its task, would keep what its callers hold.
                del loading

    def drop(self, served: Served, reason: str) -> None:
        """Forget a version; the calls that use it keep it alive to their end."""
        if served in self:
            self._drop(key_of(served.located), reason)

    async def close(self) -> None:
        """Give up the loads that go on."""
        tasks = [loading.task for loading in self._loading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop = None

    def _begin(self, key: Key, located: Located, rank: int, place: Place | None) -> _Loading:
        loading = self._loading[key] = _Loading(asyncio.create_task(self._load_once(key, located, rank, place)), rank)
        # If all who wait have left by then, its failure is nobody's.
        loading.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return loading

    async def _load_once(self, key: Key, located: Located, rank: int, place: Place | None) -> Served:
        started_at = time.monotonic()
        files: Files = None
        try:
            # As they are before they are read, so that no change is missed.
            files = await asyncio.to_thread(_files, located.checkpoint)
            async with self._room_for(located, rank):
                with nullcontext() if place is None else place.loading():
                    served = await self._wiring.load(located)
                self.budget.hold(served.footprint)
        except (CheckpointCorrupt, TrainingFailed) as error:
            raise await self._refusal(key, located, error, files) from error
        except ModelTooLarge as error:
            self._tell("failed", located, str(error))
            raise
        finally:
            del self._loading[key]
        self._failed.pop(key, None)
        if located.version is not None:
            self._took[located.version.name] = served.footprint.num_bytes
        if not self._is_wanted(served):
            return served
        self._entries[key] = _Entry(served, rank if rank != CALLER else AHEAD)
        self._tell("loaded", located, "")
        if rank == CALLER:
            self.touch(served)
        # It may take more than was expected; what nobody asked for goes then.
        if not self._make_room(0, self._entries[key].used) and rank != CALLER:
            self._drop(key, "it takes more than was expected")
            raise self._full(located, served.footprint.num_bytes)
        self._say_loaded(served, time.monotonic() - started_at)
        return served

    def _say_loaded(self, served: Served, took_s: float) -> None:
        log.info(
            "%s loaded (%s) in %.2f s; it takes %s, and all models %s of %s",
            served.located.label,
            served.card.architecture,
            took_s,
            format_size(served.footprint.num_bytes),
            format_size(self.budget.held),
            format_size(self.budget.num_bytes),
        )

    async def _refusal(self, key: Key, located: Located, error: TandemError, files: Files) -> TandemError:
        """Return what callers are told of a failed load; what is broken is remembered and logged, once."""
        if not await asyncio.to_thread(self._is_volume_there):
            # Not the checkpoint's fault.
            return VolumeUnavailable(f"{located.label} can't be read: the shared volume is not there; try again")
        said, before = f"{located.label} can't be served: {error}", self._failed.get(key)
        if before is None or before.said != said:
            log.error("%s can't be loaded and is refused: %s", located.label, error)
        self._tell("failed", located, str(error))
        num_before = 0 if before is None or before.differs(files) else before.num_failures
        self._failed[key] = _Failure(said, time.monotonic(), files, num_before + 1)
        return CheckpointCorrupt(said)

    async def _has_changed(self, key: Key, failure: _Failure) -> bool:
        return failure.differs(await asyncio.to_thread(_files, key[0]))

    @asynccontextmanager
    async def _room_for(self, located: Located, rank: int) -> AsyncIterator[None]:
        """Hold room for a load within the context."""
        needed = await self._needed_bytes(located)
        if needed > self.budget.num_bytes:
            raise ModelTooLarge(
                f"{located.label} needs about {format_size(needed)} to be loaded, and all models may take "
                f"{format_size(self.budget.num_bytes)} on this server: raise TANDEM_MODEL_MEMORY"
            )
        await self._reserve(located, needed, rank)
        try:
            yield
        finally:
            self.budget.reserve(-needed)
            self._after_release()

    async def _needed_bytes(self, located: Located) -> int:
        needed = await asyncio.to_thread(self._wiring.needed_bytes, located)
        return needed if located.version is None else max(needed, self._took.get(located.version.name, 0))

    async def _reserve(self, located: Located, needed: int, rank: int) -> None:
        if rank != CALLER:
            if self._turn.locked() or not self._make_room(needed, rank):
                raise self._full(located, needed)
            self.budget.reserve(needed)
            return
        try:
            async with asyncio.timeout(ROOM_WAIT_S), self._turn:
                while not self._make_room(needed, rank):
                    await self._let_go()
                self.budget.reserve(needed)
        except TimeoutError:
            raise self._full(located, needed) from None

    async def _let_go(self) -> None:
        """Wait until something may have been let go of."""
        self._released.clear()
        # Errors and what they were raised in go round in circles at times; nobody tells when one is left.
        await asyncio.to_thread(gc.collect)
        with suppress(TimeoutError):
            async with asyncio.timeout(COLLECT_EVERY_S):
                await self._released.wait()

    def _full(self, located: Located, needed: int) -> MemoryFull:
        return MemoryFull(
            f"there is no room for {located.label}: it needs about {format_size(needed)}, and "
            f"{format_size(self.budget.held)} of {format_size(self.budget.num_bytes)} are in use; try again in "
            f"{RETRY_AFTER_S:g} s, or raise TANDEM_MODEL_MEMORY",
            RETRY_AFTER_S,
        )

    def _make_room(self, needed: int, rank: int) -> bool:
        """Drop what was used before `rank` until `needed` bytes fit; return whether they do."""
        # By their keys: whoever holds an entry keeps it in memory.
        lower = [key for key in self._by_use() if self._entries[key].used < rank]
        busy = [key for key in lower if self.is_busy(self._entries[key].served)]
        # A caller waits for what was dropped before to be let go of, rather than drop more each time it looks.
        missing = self.budget.lacks(needed) - (self._num_leaving_bytes() if rank == CALLER else 0)
        for key in lower:
            if missing > 0 and key not in busy:
                missing -= self._drop(key, "another needs its room")
        # Of those in use no more than must be: what was dropped before will be let go of, too.
        missing = self.budget.lacks(needed) - self._num_leaving_bytes()
        for key in busy if rank == CALLER else ():
            if missing > 0:
                missing -= self._drop(key, "another needs its room")
        return self.budget.lacks(needed) <= 0

    def _by_use(self) -> list[Key]:
        return sorted(self._entries, key=lambda key: self._entries[key].used)

    def _drop(self, key: Key, reason: str) -> int:
        """Forget a version; return the bytes that it takes."""
        served = self._entries.pop(key).served
        self._leaving[key] = served
        self._on_drop(served)
        self._tell("unloaded", served.located, reason)
        log.info("%s dropped from memory: %s", served.located.label, reason)
        return served.footprint.num_bytes

    def _num_leaving_bytes(self) -> int:
        return self.budget.held - sum(entry.served.footprint.num_bytes for entry in self._entries.values())

    def _wake(self) -> None:
        """Tell the loads that wait that something was let go of; called on any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._after_release)

    def _after_release(self) -> None:
        self._released.set()
        return_to_system()


def _files(checkpoint: Path) -> Files:
    try:
        with os.scandir(checkpoint) as entries:
            looked = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return None
    return frozenset((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in looked)


def key_of(located: Located) -> Key:
    """Return what tells versions apart: the directory, and the digest of what is in it."""
    return located.checkpoint, located.digest
