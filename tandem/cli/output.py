"""What every command shares: the --json option, the volume, and how results are printed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tandem.errors import InvalidRequest, TandemError
from tandem.settings import Settings
from tandem.volume import Volume, replace_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tandem.checkpoints.registry import Registry

_PIPE_WIDTH = 1000

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """Add --json, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)


def print_json(document: Any) -> None:
    """Print one JSON document on one line, at once, so that streams read as JSON lines."""
    click.echo(json.dumps(document, ensure_ascii=False))


def console(stderr: bool = False) -> "Console":
    """Return a rich console on stdout or stderr; rich is imported here because it takes 0.1 s.

    It prints text as it is: a file named cat[bold].png is no markup.
    """
    from rich.console import Console

    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    # Into a pipe a table goes unwrapped, so that grep finds whole lines.
    return Console(
        stderr=stderr,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=not is_terminal,
        width=None if is_terminal else _PIPE_WIDTH,
    )


def table(*columns: str) -> "Table":
    """Return an unframed table with these headings."""
    from rich.table import Table

    result = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column, overflow="fold")
    return result


def open_volume() -> Volume:
    """Return the volume that TANDEM_HOME names."""
    settings = Settings.from_environment()
    return Volume(settings.home, settings.checkpoint_store)


def check_output(path: Path) -> None:
    """Raise InvalidRequest where no file can be written at `path`; before anything is computed."""
    if path.is_dir():
        raise InvalidRequest(f"can't write {path}: it is a folder; give the path of a file")
    if not path.absolute().parent.is_dir():
        raise InvalidRequest(f"can't write {path}: there is no folder {path.absolute().parent}")


def write_output(path: Path, text: str) -> None:
    """Write a file that a person asked for, whole or not at all; raise InvalidRequest where it can't be written."""
    try:
        # UTF-8 whatever the locale is: a codec of it would fail at the first é.
        replace_file(path, text.encode())
    except OSError as error:
        raise InvalidRequest(f"can't write {path}: {error.strerror or error}") from error


def open_registry() -> "Registry":
    """Return the registry of that volume, as all hosts have it; what can't be read of a store is told, and left."""
    from tandem.checkpoints.registry import Registry

    registry = Registry(open_volume())
    try:
        registry.catch_up_all()
    except TandemError as error:
        click.echo(f"tandem: as this volume has it: {error}", err=True)
    return registry
