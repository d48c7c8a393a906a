"""What a server keeps of an object store on its volume, which is a cache then: bounded, verified, and never half there.

A checkpoint comes before the version that names it, and a version before the alias; they go in the other order. While
the store is away, what is here stays.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from tandem.checkpoints.files import remove_checkpoints
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.room import bytes_on_disk
from tandem.checkpoints.store.inputs import SPEC_FILE
from tandem.checkpoints.store.journal import Journal, ModelState
from tandem.checkpoints.store.objects import ObjectStore
from tandem.checkpoints.store.transfer import Stored, download_checkpoint, find_stored
from tandem.checkpoints.version import Version, version_path
from tandem.errors import (
    CheckpointCorrupt,
    InvalidName,
    ModelNotFound,
    StoreUnavailable,
    TandemError,
    VolumeUnavailable,
)
from tandem.names import check_name
from tandem.sizes import format_size
from tandem.volume import Volume

log = logging.getLogger(__name__)


class StoreCache:
    """Keeps `volume` in step with its store, in `num_bytes`: what aliases name first, then the newest versions.

    While something new comes, what it takes the place of is there too: the bound holds after each look.
    """

    def __init__(self, volume: Volume, store: ObjectStore, num_bytes: int) -> None:
        self.volume, self._store, self._bound = volume, store, num_bytes
        self._journal = Journal(store)
        self.registry = Registry(volume, is_here=self.is_here)
        # By the manifest's SHA-256: where it lies, and what was said of one that can't be had.
        self._found: dict[str, Stored] = {}
        self._refused: dict[str, str] = {}

    def is_here(self, version: Version) -> bool:
        """Return whether the checkpoint of a version is on the volume."""
        return self._place(version).is_dir()

    def refresh(self) -> bool:
        """Bring what is new and let go of what has no room; return whether models have changed.

        Raises StoreUnavailable where the store is away; then all that was there is there. A checkpoint that is damaged
        is passed over, with a line in the log.
        """
        states = dict(self._states())
        wanted = self._wanted(states)
        for version in wanted:
            if not self.is_here(version):
                self._fetch(version)
        # Only now: what is to go may be served until what takes its place is here.
        if all(map(self.is_here, wanted)):
            self._evict(states, wanted)
        changed = [name for name in states if self._show(name)]
        return bool(changed)

    def _states(self) -> Iterator[tuple[str, ModelState]]:
        for name in self._journal.names():
            try:
                directory = self.volume.model(check_name(name, "model"))
                directory.mkdir(parents=True, exist_ok=True)
                self._journal.pull(directory)
                if (state := self._journal.read(directory)) is not None:
                    yield name, state
            except (InvalidName, CheckpointCorrupt) as error:
                self._say_once(name, error)

    def _wanted(self, states: dict[str, ModelState]) -> list[Version]:
        """Return the versions that are to be here, the most wanted first, as far as there is room."""
        wanted, left, bound = [], self._bound, f"TANDEM_CHECKPOINT_CACHE, {format_size(self._bound)}"
        for version in _most_wanted_first(states):
            num_bytes = self._num_bytes(version)
            if num_bytes is None:
                continue
            if num_bytes > left:
                # Nothing less wanted takes the place of what would fit once there is room.
                left = 0 if num_bytes <= self._bound else left
                self._say_once(f"{version.name}:{version.version}", MemoryError(f"no room in {bound}"))
                continue
            wanted.append(version)
            left -= num_bytes
        return wanted

    def _num_bytes(self, version: Version) -> int | None:
        """Return what a checkpoint takes; None where it can't be had."""
        if self.is_here(version):
            return bytes_on_disk(self._place(version))
        if version.sha256 in self._refused:
            return None
        try:
            if version.sha256 not in self._found:
                name = self._place(version).name
                self._found[version.sha256] = find_stored(self._store, version.run_id, name, version.sha256)
        except ModelNotFound as error:
            self._say_once(f"{version.name}:{version.version}", error)
            return None
        return self._found[version.sha256].num_bytes

    def _fetch(self, version: Version) -> None:
        try:
            stored = self._found[version.sha256]
            download_checkpoint(self._store, stored, self._place(version), version.sha256)
            log.info("%s:%d came from %s", version.name, version.version, self._store.address)
        except CheckpointCorrupt as error:
            # Objects are never altered: what is damaged stays so, until this server starts anew.
            self._say_once(version.sha256, error)
        except StoreUnavailable:
            raise
        except VolumeUnavailable as error:
            # A full disk: what fits is looked for all the same, and this one again the next time.
            self._say_once(f"{version.name}:{version.version}", error)

    def _evict(self, states: dict[str, ModelState], wanted: Sequence[Version]) -> None:
        kept = {self._place(version) for version in wanted}
        for name, state in states.items():
            for version in state.versions.values():
                place = self._place(version)
                # A run that has its spec here is a trainer's, on a volume that both share.
                if place not in kept and place.is_dir() and not (place.parent.parent / SPEC_FILE).exists():
                    version_path(self.volume.model(name), version.version).unlink(missing_ok=True)
                    remove_checkpoints([place])
                    log.info("%s:%d made room in the cache", name, version.version)

    def _show(self, name: str) -> bool:
        try:
            return self.registry.catch_up(name)
        except TandemError as error:
            self._say_once(name, error)
            return False

    def _place(self, version: Version) -> Path:
        return self.volume.run(version.run_id) / "checkpoints" / Path(version.checkpoint).name

    def _say_once(self, what: str, error: Exception) -> None:
        if self._refused.get(what) != str(error):
            log.warning("%s is not served from the store: %s", what, error)
        self._refused[what] = str(error)


def _most_wanted_first(states: dict[str, ModelState]) -> list[Version]:
    named = {
        (name, number): state.versions[number]
        for name, state in states.items()
        for number in state.aliases.values()
        if number in state.versions
    }
    every = {(name, number): each for name, state in states.items() for number, each in state.versions.items()}
    newest = sorted(every.items(), key=lambda pair: pair[1].created_at, reverse=True)
    return list({**named, **dict(newest)}.values())
