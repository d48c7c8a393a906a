"""Ending or refusing what a program does to a volume, between any two of its system calls."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import tandem.volume

WRITES = ("mkdir", "rename", "replace", "fsync")
REMOVALS = ("unlink", "rmdir")


class Killed(BaseException):
    """What a SIGKILL is to a process: it does nothing more, and cleans nothing up."""


class SystemCalls:
    """Counts the calls that change a volume, and raises `error()` instead of call number `at` (from 1; 0: never).

    With `is_death` it does so instead of each call after that too. A write that is interrupted leaves half.
    """

    def __init__(self, error: Callable[[], BaseException], at: int, is_death: bool) -> None:
        self._error, self._at, self._is_death = error, at, is_death
        self.count = 0
        self.last = ""

    def step(self, name: str) -> None:
        self.count += 1
        if self._at and (self.count == self._at or (self._is_death and self.count > self._at)):
            self.last = self.last or name
            raise self._error()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.step(name)
            return call(*arguments, **options)

        return counted

    def open(self, path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "w" not in mode:
            return open(path, mode, *rest, **options)
        self.step("open")
        file: Any = open(path, mode, *rest, **options)  # noqa: SIM115
        return _Halving(file, self)


class _Halving:
    def __init__(self, file: Any, calls: SystemCalls) -> None:
        self._file, self._calls = file, calls

    def __enter__(self) -> "_Halving":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        try:
            self._calls.step("write")
        except BaseException:
            self._file.write(data[: len(data) // 2])
            raise
        self._file.write(data)


@contextmanager
def interrupted(
    error: Callable[[], BaseException], at: int, is_death: bool, names: tuple[str, ...]
) -> Iterator[SystemCalls]:
    """Interrupt the calls of `os` in `names`, and the writes of `tandem.volume`, within this block."""
    calls = SystemCalls(error, at, is_death)
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, calls.wrap(name, getattr(os, name)))
        patch.setattr(tandem.volume, "open", calls.open, raising=False)
        yield calls
