"""Paths on the shared volume, and writes to it that are whole or absent."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import VolumeUnavailable
from tandem.names import check_name


@dataclass(frozen=True)
class Volume:
    """Where everything lies under $TANDEM_HOME; names are checked before they become paths."""

    home: Path

    @property
    def datasets(self) -> Path:
        """Prepared data, one directory a dataset."""
        return self.home / "datasets"

    @property
    def runs(self) -> Path:
        """One directory a run."""
        return self.home / "runs"

    @property
    def models(self) -> Path:
        """The registry, one directory a model."""
        return self.home / "models"

    @property
    def local(self) -> Path:
        """Sockets, logs and the state file of `tandem up`."""
        return self.home / "local"

    def dataset(self, name: str) -> Path:
        """Return the directory of dataset `name`, which need not exist."""
        return self.datasets / check_name(name, "dataset")

    def run(self, run_id: str) -> Path:
        """Return the directory of run `run_id`, which need not exist."""
        return self.runs / check_name(run_id, "run")

    def model(self, name: str) -> Path:
        """Return the registry directory of model `name`, which need not exist."""
        return self.models / check_name(name, "model")


@contextmanager
def volume_errors(path: Path) -> Iterator[None]:
    """Turn an OSError (full, read-only, not permitted) into VolumeUnavailable naming `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise VolumeUnavailable(
            f"can't write {error.filename or path}: {reason}; TANDEM_HOME must be a writable volume with room"
        ) from error


def fsync_directory(path: Path) -> None:
    """Make the names in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` to the new file `path` and fsync it; not atomic by itself."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes, durable: bool = True) -> None:
    """Put `data` at `path` atomically: a reader sees the old bytes or the new, never a part.

    `durable=False` skips the fsyncs, for records that are rewritten twice a second.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if durable:
            write_durably(temporary, data)
        else:
            temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def to_json(document: Any) -> bytes:
    """Return `document` as indented UTF-8 JSON with a final newline."""
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def replace_json(path: Path, document: Any, durable: bool = True) -> None:
    """Put `document` at `path` as JSON, atomically."""
    replace_file(path, to_json(document), durable)
