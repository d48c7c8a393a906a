"""Checkpoints to the store and back: files first, the manifest last; without it a checkpoint is absent.

The folder of a checkpoint carries digits of its manifest's SHA-256, so that two attempts that save the same step never
mix their files: equal bytes are the same objects, other bytes lie elsewhere.
"""

import hashlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tandem.checkpoints.files import MANIFEST_FILE, Entries, parse_manifest, place_checkpoint, step_of, verify
from tandem.checkpoints.room import free_bytes, room_needed, too_little
from tandem.checkpoints.store.objects import ObjectStore
from tandem.errors import CheckpointCorrupt, ModelNotFound
from tandem.volume import Volume, sync_together, volume_errors

_DIGITS = 16
_FOLDER = re.compile(r"(step-\d{8,})\.([0-9a-f]{16})")


@dataclass(frozen=True)
class Stored:
    """A whole checkpoint in the store: its run, its name (step-00001234), its folder, and the bytes of its files."""

    run_id: str
    name: str
    folder: str
    num_bytes: int

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return step_of(Path(self.name))

    @property
    def digits(self) -> str:
        """The first digits of the manifest's SHA-256."""
        return self.folder.rpartition(".")[2]

    @property
    def prefix(self) -> str:
        """Where its objects lie."""
        return f"runs/{self.run_id}/checkpoints/{self.folder}"

    def place(self, volume: Volume) -> Path:
        """Return where it belongs on a volume."""
        return volume.run(self.run_id) / "checkpoints" / self.name


def stored_name(name: str, digest: str) -> str:
    """Return the folder of the checkpoint `name` whose manifest has the SHA-256 `digest`."""
    return f"{name}.{digest[:_DIGITS]}"


def list_stored(store: ObjectStore, run_id: str) -> list[Stored]:
    """Return the checkpoints of a run that have a manifest, oldest first."""
    sizes: dict[str, dict[str, int]] = {}
    place = f"runs/{run_id}/checkpoints"
    for name, num_bytes in store.sizes(place).items():
        # What somebody else has left there lies in no folder, or in another.
        folder, _, file = name.removeprefix(f"{place}/").partition("/")
        sizes.setdefault(folder, {})[file] = num_bytes
    found = [
        Stored(run_id, match[1], folder, sum(files.values()))
        for folder, files in sizes.items()
        if (match := _FOLDER.fullmatch(folder)) and MANIFEST_FILE in files
    ]
    return sorted(found, key=lambda each: (each.step, each.folder))


def upload_checkpoint(store: ObjectStore, run_id: str, name: str, source: Path) -> str:
    """Upload the directory `source` as checkpoint `name` of a run; return the SHA-256 of its manifest.

    It is verified before. Raises CheckpointCorrupt, StoreUnavailable; then no manifest is there, and so no checkpoint.
    """
    digest = verify(source)
    prefix = f"runs/{run_id}/checkpoints/{stored_name(name, digest)}"
    there = store.sizes(prefix)
    for file in sorted(source.iterdir()):
        target = f"{prefix}/{file.name}"
        # What an upload that was torn has left is of these bytes: the folder's name says so.
        if file.name != MANIFEST_FILE and there.get(target) != file.stat().st_size:
            store.upload(target, file)
    store.put(f"{prefix}/{MANIFEST_FILE}", (source / MANIFEST_FILE).read_bytes())
    return digest


def remove_stored(store: ObjectStore, doomed: Iterable[Stored]) -> None:
    """Remove checkpoints, the manifest of each first, so that no reader finds a part of it whole."""
    for each in doomed:
        store.remove([f"{each.prefix}/{MANIFEST_FILE}"])
        store.remove(store.sizes(each.prefix))


def find_stored(store: ObjectStore, run_id: str, name: str, digest: str) -> Stored:
    """Return the checkpoint `name` of a run with this manifest; raise ModelNotFound where the store has none."""
    for each in list_stored(store, run_id):
        if each.folder == stored_name(name, digest):
            return each
    raise ModelNotFound(f"run:{run_id}/{step_of(Path(name))} is not in {store.address}")


def _nothing() -> None:
    pass


def download_checkpoint(
    store: ObjectStore,
    stored: Stored,
    place: Path,
    digest: str | None = None,
    goes_on: Callable[[], None] = _nothing,
) -> None:
    """Bring a checkpoint to `place` on the volume: whole, verified and durable, or not at all.

    `goes_on` is called between files. Raises CheckpointCorrupt for bytes that are not the manifest's, StoreUnavailable,
    VolumeUnavailable where there is too little room.
    """
    temporary = place.with_name(f".tmp-{place.name}.{secrets.token_hex(4)}")
    with volume_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        _check_room(stored, place.parent)
        try:
            temporary.mkdir()
            for file in _manifest(store, stored, temporary, digest):
                goes_on()
                if not store.download(f"{stored.prefix}/{file}", temporary / file):
                    raise CheckpointCorrupt(f"{store.address}/{stored.prefix} lacks {file}")
            verify(temporary)
            sync_together([*temporary.iterdir(), temporary])
            goes_on()
            place_checkpoint(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _manifest(store: ObjectStore, stored: Stored, directory: Path, digest: str | None) -> Entries:
    data = store.get(f"{stored.prefix}/{MANIFEST_FILE}")
    if data is None:
        raise CheckpointCorrupt(f"{store.address}/{stored.prefix} has no {MANIFEST_FILE}")
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(stored.digits) or digest not in (None, found):
        raise CheckpointCorrupt(f"{store.address}/{stored.prefix}/{MANIFEST_FILE} is altered")
    (directory / MANIFEST_FILE).write_bytes(data)
    return parse_manifest(data, directory / MANIFEST_FILE)


def _check_room(stored: Stored, directory: Path) -> None:
    free = free_bytes(directory)
    if free < room_needed(stored.num_bytes):
        raise too_little(stored.num_bytes, free, directory, "make room")
