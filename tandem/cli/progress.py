"""Draws the progress of long work on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import click

from tandem.cli.output import console
from tandem.data.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_INTERVAL_S = 5.0


class BarProgress:
    """A Progress for people; use it in a `with` block, so that the terminal is left tidy whatever happens."""

    def __init__(self) -> None:
        self._drawn: _Bar | _Lines = _Bar() if sys.stderr.isatty() else _Lines()

    def __enter__(self) -> Progress:
        return self._drawn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drawn.close(done=kind is None)


class _Bar:
    """One rich bar for each stage; those done stay above."""

    def __init__(self) -> None:
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, description: str, total: int | None) -> None:
        """Begin a stage."""
        if self._rich is None:
            self._rich = _rich_progress()
            self._rich.start()
        self._finish_stage()
        self._task = self._rich.add_task(description, total=total)

    def advance(self, units: int = 1) -> None:
        """Move the bar."""
        if self._rich is not None and self._task is not None:
            self._rich.advance(self._task, units)

    def _finish_stage(self) -> None:
        if self._rich is None or self._task is None:
            return
        # A stage of unknown length would go on pulsing; what it came to is its length.
        done = self._rich.tasks[-1].completed or 1
        self._rich.update(self._task, total=done, completed=done)

    def close(self, done: bool) -> None:
        """Leave the bar as it stands, full if all is done."""
        if self._rich is not None:
            if done:
                self._finish_stage()
            self._rich.stop()


class _Lines:
    """For logs: nothing for quick work, then a line every `LINE_INTERVAL_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._printed_at = clock()
        self._description = ""
        self._total: int | None = None
        self._done = 0

    def start(self, description: str, total: int | None) -> None:
        """Begin a stage."""
        self._description, self._total, self._done = description, total, 0
        self._print_if_due()

    def advance(self, units: int = 1) -> None:
        """Count, and print if the last line is a while ago."""
        self._done += units
        self._print_if_due()

    def _print_if_due(self) -> None:
        if self._clock() - self._printed_at < LINE_INTERVAL_S:
            return
        self._printed_at = self._clock()
        click.echo(f"{self._description}{self._how_far()}", err=True)

    def _how_far(self) -> str:
        if self._total:
            return f": {self._done:,} of {self._total:,} ({self._done / self._total:.0%})"
        return f": {self._done:,}" if self._done else " …"

    def close(self, done: bool) -> None:
        """Do nothing: the command's own last line says how it ended."""


def _rich_progress() -> "RichProgress":
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console(stderr=True),
    )
