"""The options of every command that submits runs: place in the queue, limits, links to other runs."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from tandem.errors import InvalidJob
from tandem.jobs.record import PRIORITIES
from tandem.jobs.scheduling import Scheduling, make_scheduling

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_FIELDS = ("priority", "key", "time_limit_s", "gpu", "webhook", "after", "max_failures")


class Duration(click.ParamType):  # type: ignore[type-arg]
    """Seconds, or a number with a unit: 90, 90s, 30m, 1.5h, 2d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no duration; give seconds, or 30m, 1.5h, 2d", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


_OPTIONS = (
    click.option("--priority", type=click.Choice(list(PRIORITIES)), help="Place in the queue.  [default: normal]"),
    click.option(
        "--key", metavar="TEXT", help="Submitted again with the same key, the job is not run again; its run is shown."
    ),
    click.option(
        "--time-limit",
        "time_limit_s",
        type=Duration(),
        help="Computing time (90s, 30m, 1.5h, 2d), after which the run saves and ends; 'runs resume' gives it more.",
    ),
    click.option("--gpu-class", "gpu", help="The class of GPU it needs, as 'tandem status' names those there are."),
    click.option("--webhook", metavar="URL", help="Post the run's record there when it has ended."),
    click.option("--after", multiple=True, metavar="RUN", help="Begin when this run has SUCCEEDED; may be repeated."),
    click.option("--max-failures", type=int, help="Failures in a row before the run is given up.  [default: 5]"),
)


def scheduling_options(command: Command) -> Command:
    """Add the options; `take_scheduling` takes their values from the command's."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_scheduling(values: dict[str, Any]) -> Scheduling:
    """Take the options' values out of `values`; raise UsageError for one that makes no sense."""
    given = {field: values.pop(field, None) for field in _FIELDS}
    try:
        return make_scheduling({field: value for field, value in given.items() if value not in (None, ())})
    except InvalidJob as error:
        raise click.UsageError(str(error)) from None
