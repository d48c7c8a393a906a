"""How long work says how far it is: a small interface, so that what computes draws nothing."""

from typing import Protocol


class Progress(Protocol):
    """Receives progress; the command line draws a bar, tests record, `silent` ignores."""

    def start(self, description: str, total: int | None) -> None:
        """Begin a stage of `total` units (None: unknown)."""

    def advance(self, units: int = 1) -> None:
        """Say that `units` more are done."""


class Silent:
    """A Progress that says nothing."""

    def start(self, description: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, units: int = 1) -> None:
        """Ignore."""
