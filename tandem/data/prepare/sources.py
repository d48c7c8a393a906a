"""Where data comes from: files by relative name, read and never altered.

Names use '/', e.g. `train/n01443537/images/n01443537_0.JPEG`. Hidden files are left out.
"""

import hashlib
import lzma
import os
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from tandem.errors import BadSource

# A listing or a photograph of more than this is a mistake or an attack; no worker should hold it in memory.
MAX_FILE_BYTES = 64 * 2**20

_BLOCK_BYTES = 2**20
# Everything that zipfile, tarfile and their decompressors raise for damaged input.
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
)


class Readable(Protocol):
    """What images come from: bytes by name; `path` names the source in errors."""

    @property
    def path(self) -> Path:
        """Where the source is."""

    def read(self, name: str) -> bytes:
        """Return the bytes of file `name`; raise BadSource where there are none."""


class Source(ABC):
    """Files by relative name; whatever can't be read raises a BadSource that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in `folder` ('' is the top), sorted."""

    @abstractmethod
    def files(self, folder: str) -> dict[str, str]:
        """Return {name: stamp} of every file below `folder`; a stamp changes when the file's content does."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return whether there is a file `name`."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the size of file `name` in bytes, as the source declares it."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open file `name` for reading; use it inside `reading(name)`."""

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turn any failure to read file `name` into a BadSource that names it."""
        try:
            yield
        except KeyError:
            raise BadSource(f"{name} is missing in {self.path}") from None
        except OSError as error:
            raise BadSource(f"can't read {name} in {self.path}: {error.strerror or error}") from error
        except DAMAGE as error:
            raise BadSource(
                f"{name} in {self.path} is damaged or truncated ({reason(error)}); fetch the source again"
            ) from error

    def read(self, name: str) -> bytes:
        """Return the bytes of file `name`; raise BadSource if it is over MAX_FILE_BYTES."""
        with self.reading(name):
            self._check_size(name, self.size(name))
            with self.open(name) as file:
                return file.read()

    def _check_size(self, name: str, size: int) -> None:
        if size > MAX_FILE_BYTES:
            raise BadSource(f"{name} in {self.path} is {size:,} bytes; the limit for one file is {MAX_FILE_BYTES:,}")

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of file `name` a block at a time."""
        with self.reading(name), self.open(name) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block

    def text(self, name: str) -> str:
        """Return the text of the small UTF-8 file `name`."""
        if not self.has(name):
            raise BadSource(f"{name} is missing in {self.path}")
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSource(f"{name} in {self.path} is not UTF-8 at byte {error.start}") from None


class TreeSource(Source):
    """A folder; links in it are followed, once each."""

    def folders(self, folder: str) -> list[str]:
        """Return the visible folders directly in `folder`, sorted."""
        top = self.path / folder
        if not top.is_dir():
            return []
        with self.reading(folder or "."):
            return sorted(entry.name for entry in os.scandir(top) if entry.is_dir() and is_visible(entry.name))

    def files(self, folder: str) -> dict[str, str]:
        """Return {name: stamp}; the stamp is size and time of change, since reading every file would take minutes."""
        found: dict[str, str] = {}
        with self.reading(folder or "."):
            self._walk(folder.rstrip("/"), found, set())
        return dict(sorted(found.items()))

    def _walk(self, folder: str, found: dict[str, str], seen: set[tuple[int, int]]) -> None:
        here = (self.path / folder).stat()
        if (here.st_dev, here.st_ino) in seen:
            return
        seen.add((here.st_dev, here.st_ino))
        with os.scandir(self.path / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{folder}/{entry.name}" if folder else entry.name
                if not is_visible(entry.name):
                    continue
                if entry.is_dir():
                    self._walk(name, found, seen)
                elif entry.is_file():
                    status = entry.stat()
                    found[name] = f"{status.st_size} {status.st_mtime_ns}"

    def has(self, name: str) -> bool:
        """Return whether there is a file `name`."""
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        """Return the bytes of file `name`; raise BadSource if it is over MAX_FILE_BYTES."""
        # By descriptor, and the path as text: 5 µs for 2 kB, where size() and open() take 15.
        with self.reading(name):
            descriptor = os.open(f"{self.path}/{name}", os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size
                self._check_size(name, size)
                data = os.read(descriptor, size + 1)
                while len(data) != size and (more := os.read(descriptor, _BLOCK_BYTES)):
                    data += more
                return data
            finally:
                os.close(descriptor)

    def size(self, name: str) -> int:
        """Return the size of file `name` in bytes."""
        return (self.path / name).stat().st_size

    def open(self, name: str) -> IO[bytes]:
        """Open file `name`."""
        return open(self.path / name, "rb")


def check_component(name: str, source: Source) -> str:
    """Return `name` if a file or folder of a dataset may be called so, else raise BadSource."""
    if not name or name.startswith(".") or "/" in name or not is_printable(name):
        raise BadSource(f"{name!r} in {source.path} can't be the name of a class or an image; rename it")
    return name


def check_md5(path: Path, expected: str) -> None:
    """Raise BadSource unless file `path` has the MD5 `expected` (hexadecimal)."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise BadSource(f"can't read {path}: {error.strerror or error}") from error
    if found != expected:
        raise BadSource(
            f"{path} is altered or truncated: its MD5 is {found}, that of the official archive {expected}; "
            "download it again, or pass --no-checksum to take it as it is"
        )


def is_printable(name: str) -> bool:
    """Return whether `name` is free of control characters, line separators and bytes that are no text."""
    # Rare blanks and joiners are not printable to Python, and yet fine.
    return name.isprintable() or all(unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") for char in name)


def reason(error: Exception) -> str:
    """Return what an error says, on one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def is_visible(name: str) -> bool:
    """Return whether no part of `name` is hidden, nor what macOS adds to its zips."""
    return not name.startswith(".") and "/." not in name and "__MACOSX" not in name.split("/")
