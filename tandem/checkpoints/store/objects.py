"""An object store by its address, through fsspec: few operations, none of which needs a rename or a lock."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tandem.errors import InvalidRequest, StoreUnavailable

# A store that does not answer is to be found out in seconds; whoever waits for it tries again by himself.
_S3 = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 2, "mode": "standard"}},
}


class ObjectStore:
    """The objects under `address`; their names are relative to it, with slashes.

    Any operation raises StoreUnavailable where the store does not answer or refuses; InvalidRequest where the package
    for its protocol is not installed. Nothing is imported or connected before the first of them.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def put(self, name: str, data: bytes) -> None:
        """Write an object whole, over one that may be there."""
        with self._errors():
            self._files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object where there is none; False if there is one, which stays."""
        with self._errors():
            try:
                self._files.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def upload(self, name: str, file: Path) -> None:
        """Write a file's bytes as an object; a killed upload leaves no object."""
        with self._errors(file):
            self._files.put_file(str(file), self._path(name))

    def get(self, name: str) -> bytes | None:
        """Return an object's bytes, None where there is none."""
        with self._errors():
            try:
                data: bytes = self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None
        return data

    def download(self, name: str, file: Path) -> bool:
        """Write an object's bytes to a new file; False where there is none."""
        with self._errors(file):
            try:
                self._files.get_file(self._path(name), str(file))
            except FileNotFoundError:
                return False
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the objects under `folder`, by their names, with their bytes."""
        with self._errors():
            found = self._files.find(self._path(folder), detail=True)
        skip = len(self._root) + 1
        return {path[skip:]: int(facts["size"]) for path, facts in sorted(found.items()) if facts["type"] == "file"}

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in `folder`, sorted."""
        with self._errors():
            try:
                found = self._files.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return []
        return sorted(each["name"].rstrip("/").rpartition("/")[2] for each in found if each["type"] == "directory")

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, one after another; those that are gone already are passed over."""
        for name in names:
            with self._errors():
                try:
                    self._files.rm_file(self._path(name))
                except FileNotFoundError:
                    continue

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        # Takes 0.9 s with s3fs, so that it is not done where it may not be needed.
        try:
            from fsspec.core import url_to_fs

            logging.getLogger("botocore").setLevel(logging.WARNING)
            # A listing that is remembered would hide what another host has written.
            options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
            if self.address.startswith("s3://"):
                options |= _S3
            elif self.address.startswith("file://"):
                options |= {"auto_mkdir": True}
            files, root = url_to_fs(self.address, **options)
            files.retries = 2
        except ImportError as error:
            raise InvalidRequest(f"{self.address} needs a package: {error}; pip install 'tandem[s3]'") from error
        return files, root.rstrip("/")

    @contextmanager
    def _errors(self, file: Path | None = None) -> Iterator[None]:
        try:
            yield
        except (InvalidRequest, StoreUnavailable):
            raise
        except Exception as error:
            if file is not None and isinstance(error, OSError) and error.filename == str(file):
                # The volume's, not the store's.
                raise
            # botocore, aiohttp and fsspec have no class in common.
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise StoreUnavailable(f"the object store {self.address} can't be used: {said}") from error
