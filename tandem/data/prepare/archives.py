"""Zip and tar files as sources.

They are never extracted by the names in them, and one that holds a name that climbs out, a link, a device or an
encrypted entry is refused whole.
"""

import re
import stat
import tarfile
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO

from tandem.data.prepare.sources import DAMAGE, Source, TreeSource, is_printable, is_visible, reason
from tandem.errors import BadSource

_BLOCK_BYTES = 2**20
_DRIVE = re.compile(r"[A-Za-z]:")


class ArchiveSource(Source):
    """What zip and tar files share: an index of checked names, read once."""

    @abstractmethod
    def _index(self) -> Iterable[tuple[str, str]]:
        """Yield (name, stamp) of every entry, folders with a final '/'; raise BadSource for one not to be trusted."""

    @cached_property
    def names(self) -> dict[str, str]:
        """{name: stamp} of every visible entry; folders end in '/'."""
        names: dict[str, str] = {}
        with self.reading("the index"):
            for name, stamp in self._index():
                self._check(name)
                if name in names and not name.endswith("/"):
                    raise BadSource(f"{self.path} holds the entry {name!r} twice")
                names[name] = stamp
        return {name: stamp for name, stamp in sorted(names.items()) if is_visible(name)}

    def folders(self, folder: str) -> list[str]:
        """Return the visible folders directly in `folder`, sorted."""
        start = f"{folder.rstrip('/')}/" if folder else ""
        below = (name[len(start) :] for name in self.names if name.startswith(start))
        return sorted({name.partition("/")[0] for name in below if "/" in name})

    def files(self, folder: str) -> dict[str, str]:
        """Return {name: stamp}; the stamp holds size and checksum."""
        start = f"{folder.rstrip('/')}/" if folder else ""
        return {name: stamp for name, stamp in self.names.items() if name.startswith(start) and not name.endswith("/")}

    def has(self, name: str) -> bool:
        """Return whether there is a file `name`."""
        return name in self.names

    def _check(self, name: str) -> None:
        if not is_printable(name):
            raise BadSource(f"{self.path} holds the entry {name!r}, with control characters in its name")
        if name.startswith("/") or "\\" in name or _DRIVE.match(name) or ".." in name.split("/"):
            raise BadSource(
                f"{self.path} holds the entry {name!r}, which climbs out of the archive; it is not to be trusted"
            )

    def _refuse(self, name: str, what: str) -> BadSource:
        return BadSource(
            f"{self.path} holds the entry {name!r}, which is {what}; unpack it by hand and pass the folder"
        )


class ZipSource(ArchiveSource):
    """A zip file. It travels to another process as its path, and each opens its own handle."""

    def __reduce__(self) -> tuple[type["ZipSource"], tuple[Path]]:
        return ZipSource, (self.path,)

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except OSError as error:
            raise BadSource(f"can't read {self.path}: {error.strerror or error}") from error
        except DAMAGE as error:
            raise BadSource(
                f"{self.path} is no whole zip file ({reason(error)}): truncated or altered; fetch it again"
            ) from error

    def _index(self) -> Iterator[tuple[str, str]]:
        for entry in self._zip.infolist():
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise self._refuse(entry.filename, "a link")
            if entry.flag_bits & 0x1:
                raise self._refuse(entry.filename, "encrypted")
            yield entry.filename, f"{entry.file_size} {entry.CRC:08x}"

    def size(self, name: str) -> int:
        """Return the declared size of file `name` in bytes; reading never yields more."""
        return self._zip.getinfo(name).file_size

    def open(self, name: str) -> IO[bytes]:
        """Open file `name`; its CRC is checked when its end is read."""
        return self._zip.open(name)


class TarSource(ArchiveSource):
    """A tar file, compressed or not. Reading its files in another order than they lie in is slow."""

    @cached_property
    def _tar(self) -> tarfile.TarFile:
        try:
            return tarfile.open(self.path)
        except OSError as error:
            raise BadSource(f"can't read {self.path}: {error.strerror or error}") from error
        except DAMAGE as error:
            raise BadSource(
                f"{self.path} is no whole tar file ({reason(error)}): truncated or altered; fetch it again"
            ) from error

    def _index(self) -> Iterator[tuple[str, str]]:
        for member in self._tar.getmembers():
            if not (member.isfile() or member.isdir()):
                raise self._refuse(member.name, "a link or a device")
            name = member.name.removeprefix("./")
            yield (f"{name}/" if member.isdir() else name), f"{member.size} {member.mtime}"
        # tarfile stops at the last entry; the checksum of a compressed file is only compared at its very end.
        stream = self._tar.fileobj
        while stream is not None and stream.read(_BLOCK_BYTES):
            pass

    def _member(self, name: str) -> tarfile.TarInfo:
        try:
            return self._tar.getmember(name)
        except KeyError:
            return self._tar.getmember(f"./{name}")

    def size(self, name: str) -> int:
        """Return the size of file `name` in bytes."""
        return self._member(name).size

    def open(self, name: str) -> IO[bytes]:
        """Open file `name`."""
        file = self._tar.extractfile(self._member(name))
        if file is None:
            raise KeyError(name)
        return file


def open_source(path: Path) -> Source:
    """Return the folder, zip or tar file at `path` as a Source; raise BadSource for anything else."""
    if path.is_dir():
        return TreeSource(path)
    if not path.is_file():
        raise BadSource(f"there is no file or folder {path}")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadSource(f"can't read {path}: {error.strerror or error}") from error
    if magic[:2] == b"PK":
        return ZipSource(path)
    if magic[:2] in (b"\x1f\x8b", b"BZ") or magic == b"\xfd7zX" or path.suffix == ".tar":
        return TarSource(path)
    raise BadSource(f"{path} is neither a folder nor a zip file; a download that failed often leaves a web page")


def open_random_access(path: Path) -> Source:
    """Return the folder or zip file at `path`, whose files can be read in any order; raise BadSource for a tar file."""
    source = open_source(path)
    if isinstance(source, TarSource):
        raise BadSource(f"{path} is a tar file: unpack it and pass the folder")
    return source
