"""How a dataset comes to be: built in a staging directory, and named only when it is whole.

datasets/.<name>.partial/           what is being built; an interruption leaves it, and the next call goes on
datasets/.<name>.partial/.work/     staging.json (what it is built from) and the recipe's own notes
datasets/.<name>.lock               held while one process prepares `name`
datasets/.<name>.old                the dataset that `force` replaces, until the new one has the name
datasets/<name>/source.json         what a whole dataset was made from, so that preparing it again is quick
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from tandem.data.manifest import MANIFEST_FILE, Dataset, ImageDataset, TextDataset, read_dataset
from tandem.data.prepare.download import is_remote, local_source, public_form
from tandem.data.progress import Progress
from tandem.errors import BadSource, Conflict, DatasetNotFound, VolumeUnavailable
from tandem.volume import Volume, fsync_directory, replace_json, to_json, volume_errors, write_durably

# Part of every identity: raise it when the same source would be prepared into other bytes.
FORMAT = 1
SOURCE_FILE = "source.json"

D = TypeVar("D", ImageDataset, TextDataset)
D_co = TypeVar("D_co", ImageDataset, TextDataset, covariant=True)


@dataclass(frozen=True)
class Record:
    """What a dataset is made from: `origin` is a path or address, `identity` a SHA-256 over source and options."""

    recipe: str
    options: Mapping[str, str | int | float | bool | None]
    origin: str
    identity: str

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """Return the record in file `path`, None where there is none that can be read."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Staging:
    """The directory in which a dataset is built, and what it is to be called."""

    path: Path
    name: str
    origin: str

    @property
    def work(self) -> Path:
        """For what the recipe notes down for a resume; not part of the dataset."""
        return self.path / ".work"


class Job(Protocol[D_co]):
    """A source that was looked through and found fit to be prepared."""

    def identity(self) -> Mapping[str, str]:
        """Return {file name: stamp} of all that goes into the dataset."""

    def build(self, staging: Staging, progress: Progress) -> D_co:
        """Fill the staging directory, going on with what lies there, and return the manifest."""


class Recipe(Protocol[D_co]):
    """A way to prepare; `name` and `options` say with the source what comes out."""

    @property
    def name(self) -> str:
        """Name of the recipe, e.g. `tiny-imagenet`."""

    @property
    def options(self) -> Mapping[str, str | int | float | bool | None]:
        """What changes the outcome."""

    def open(self, path: Path, progress: Progress) -> Job[D_co]:
        """Look through the source at `path`; raise BadSource if it is not fit."""


@dataclass(frozen=True)
class Preparation(Generic[D]):
    """One preparation: `name` on `volume`, from `source` (a path, an address, None for a recipe that makes it)."""

    volume: Volume
    name: str
    source: str | None
    recipe: Recipe[D]
    kind: type[D]
    force: bool
    progress: Progress

    def run(self) -> D:
        """Return the manifest of the dataset, prepared now or before.

        Raises BadSource; Conflict if the name is taken by another source (unless `force`) or being prepared by another
        process; Unavailable (network); VolumeUnavailable.
        """
        target = self.volume.dataset(self.name)
        with volume_errors(target), _lock(self.volume, self.name):
            _finish_replacement(target)
            if self.source and is_remote(self.source) and (known := self._known_address(target)):
                return known
            with self._local_source() as path:
                job = self.recipe.open(path, self.progress)
                record = self._record(job.identity())
                return self._existing(target, record) or self._build(target, job, record)

    @contextmanager
    def _local_source(self) -> Iterator[Path]:
        if self.source is None:
            yield Path(self.recipe.name)
            return
        with local_source(self.volume, self.source, self.progress) as path:
            yield path

    @property
    def _origin(self) -> str:
        """What may be recorded of where the data is from: the source, or the recipe that makes it."""
        if self.source is None:
            return self.recipe.name
        # Bytes of a file name that the locale can't tell are surrogates, which no UTF-8 file can hold.
        return public_form(self.source).encode(errors="surrogateescape").decode(errors="replace")

    def _record(self, stamps: Mapping[str, str]) -> Record:
        content = [FORMAT, self.recipe.name, sorted(self.recipe.options.items()), sorted(stamps.items())]
        identity = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return Record(self.recipe.name, self.recipe.options, self._origin, identity)

    def _known_address(self, target: Path) -> D | None:
        """Return the dataset if it came from this very address, so that no one downloads twice to learn it."""
        known = Record.read(target / SOURCE_FILE)
        if self.force or known is None:
            return None
        asked = (self.recipe.name, dict(self.recipe.options), self._origin)
        return self._manifest() if (known.recipe, known.options, known.origin) == asked else None

    def _existing(self, target: Path, record: Record) -> D | None:
        if self.force or not target.exists():
            return None
        known = Record.read(target / SOURCE_FILE)
        dataset = self._manifest() if known and known.identity == record.identity else None
        if dataset is None:
            origin = f" from {known.origin}" if known else ""
            raise Conflict(
                f"dataset {self.name!r} is there already, prepared{origin} and not from this source with these "
                "options; pass --force to replace it, or another --name"
            )
        return dataset

    def _manifest(self) -> D | None:
        try:
            dataset = read_dataset(self.volume, self.name)
        except DatasetNotFound:
            return None
        return dataset if isinstance(dataset, self.kind) else None

    def _build(self, target: Path, job: Job[D], record: Record) -> D:
        staging = _open_staging(target, self.name, record)
        try:
            with volume_errors(staging.path):
                dataset = job.build(staging, self.progress)
                self.progress.start("writing to disk", None)
                _publish(staging, target, dataset, record)
        except (BadSource, VolumeUnavailable):
            shutil.rmtree(staging.path, ignore_errors=True)
            raise
        return dataset


def _open_staging(target: Path, name: str, record: Record) -> Staging:
    """Return the staging directory of dataset `name`, emptied if it was begun from anything else."""
    staging = Staging(target.with_name(f".{name}.partial"), name, record.origin)
    note = staging.work / "staging.json"
    begun = Record.read(note)
    if begun is None or begun.identity != record.identity:
        if staging.path.exists():
            shutil.rmtree(staging.path)
        staging.work.mkdir(parents=True)
        replace_json(note, asdict(record))
    return staging


def _publish(staging: Staging, target: Path, dataset: Dataset, record: Record) -> None:
    """Make the staged files durable and give them their name; a dataset of that name goes only then."""
    shutil.rmtree(staging.work)
    write_durably(staging.path / SOURCE_FILE, to_json(asdict(record)))
    write_durably(staging.path / MANIFEST_FILE, to_json(dataset.model_dump(mode="json")))
    # One sync for all: an fsync for each of 110,000 files would take minutes.
    os.sync()
    old = _old(target)
    if target.exists():
        target.rename(old)
    staging.path.rename(target)
    fsync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _finish_replacement(target: Path) -> None:
    """Undo or finish a replacement that was killed between its two renames."""
    old = _old(target)
    if old.exists() and not target.exists():
        old.rename(target)
    elif old.exists():
        shutil.rmtree(old)


@contextmanager
def _lock(volume: Volume, name: str) -> Iterator[None]:
    """Hold the lock on dataset `name`; raise Conflict if another process has it."""
    path = volume.datasets / f".{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(
                    f"dataset {name!r} is being prepared by another process; wait for it, or pass another --name"
                ) from None
            # The last holder may have removed the file between our open and our lock: then the lock holds nothing.
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
