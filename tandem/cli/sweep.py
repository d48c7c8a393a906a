"""`tandem train --sweep`: a run for each combination of values, and the table of what came of them."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.follow import metrics_text, progress_text
from tandem.cli.output import console, print_json, table
from tandem.errors import InvalidJob, TrainingFailed
from tandem.jobs.record import JobRecord, State, new_run_id
from tandem.jobs.runs import list_runs
from tandem.jobs.scheduling import Scheduling
from tandem.jobs.spec import JobSpec, make_spec
from tandem.volume import Volume

if TYPE_CHECKING:
    from rich.table import Table

    from tandem.jobs.store import JobStore

_MOST_RUNS = 10_000
_POLL_S = 0.5


def parse_sweeps(texts: Iterable[str], command: click.Command) -> dict[str, list[str]]:
    """Return the values by field of `lr=0.1,0.05`, …; NAME is an option of `command`. Raises UsageError."""
    fields = {
        name.lstrip("-"): str(parameter.name)
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    swept: dict[str, list[str]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        field = fields.get(name.strip().lstrip("-"))
        given = [value.strip() for value in values.split(",") if value.strip()]
        if field is None or not given:
            raise click.UsageError(f"--sweep {text}: give an option of this command and its values, as lr=0.1,0.05")
        if field in swept:
            raise click.UsageError(f"--sweep {text}: this option is swept already; give all its values at once")
        swept[field] = given
    return swept


def sweep_jobs(
    values: Mapping[str, Any],
    swept: Mapping[str, Sequence[str]],
    named: Callable[[Mapping[str, Any]], dict[str, Any]],
    scheduling: Scheduling,
    max_parallel: int | None,
) -> tuple[str, list[tuple[JobSpec, Scheduling]]]:
    """Return the sweep's id, and a job for each combination; raise InvalidJob for values that make no sense.

    `named` gives values their kind, and a model name where they have none.
    """
    combinations = list(itertools.product(*swept.values()))
    if len(combinations) > _MOST_RUNS:
        raise InvalidJob(f"--sweep: {len(combinations):,} runs are more than {_MOST_RUNS:,}; leave some values away")
    if scheduling.key:
        raise InvalidJob("--key: a sweep is many runs; leave one of them away")
    sweep = f"sweep-{new_run_id()}"
    jobs = []
    for combination in combinations:
        spec = make_spec(named({**values, **dict(zip(swept, combination, strict=True))}))
        varied = {field: getattr(spec, field) for field in swept}
        changes = {"sweep": sweep, "max_parallel": max_parallel, "varied": varied}
        jobs.append((spec, scheduling.model_copy(update=changes)))
    return sweep, jobs


def show_sweep(records: Sequence[JobRecord], as_json: bool = False) -> None:
    """Print the table of a sweep, the best first, or its records as JSON."""
    if as_json:
        print_json([record.document() for record in records])
    else:
        console().print(sweep_table(records))


def sweep_table(records: Sequence[JobRecord]) -> "Table":
    """Return a row for each run: what was varied, state, progress, results; the best first."""
    fields = list(records[0].varied) if records else []
    result = table(*fields, "state", "progress", "results", "model", "run")
    for record in sorted(records, key=_rank):
        metrics = record.progress.metrics
        shown = metrics_text({name: value for name, value in metrics.items() if name.startswith("val")} or metrics)
        percent = record.progress.percent
        model = f"{record.model_name}:{record.model_version}" if record.model_version else ""
        values = [f"{record.varied.get(field)}" for field in fields]
        result.add_row(*values, record.state, f"{percent:.0f} %" if percent else "", shown, model, record.run_id)
    return result


def _rank(record: JobRecord) -> tuple[bool, float, str]:
    metrics = record.progress.metrics
    if "val_acc1" in metrics:
        return False, -metrics["val_acc1"], record.run_id
    return "val_loss" not in metrics, metrics.get("val_loss", 0.0), record.run_id


def follow_sweep(sweep: str, volume: Volume, store: "JobStore", as_json: bool) -> None:
    """Say each change of state until all runs have ended, then print the table; raise TrainingFailed if one did not.

    Ctrl-C leaves the sweep going, and says so.
    """
    said: dict[str, State] = {}
    try:
        while True:
            records = list_runs(volume, lambda: store, sweep=sweep)
            _say_changes(records, said)
            if all(record.state.is_settled for record in records):
                break
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        click.echo(f"\nthe sweep goes on; 'tandem runs list --sweep {sweep}' shows it", err=True)
        raise
    show_sweep(records, as_json)
    if bad := [record for record in records if record.state is not State.SUCCEEDED]:
        raise TrainingFailed(f"{len(bad)} of {len(records)} runs did not succeed; the first: {bad[-1].run_id}")


def _say_changes(records: Iterable[JobRecord], said: dict[str, State]) -> None:
    for record in records:
        if said.get(record.run_id) is not record.state:
            said[record.run_id] = record.state
            varied = " ".join(f"{field}={value}" for field, value in record.varied.items())
            what = progress_text(record) if record.state.is_terminal else record.message
            click.echo(f"{record.run_id}  {varied}  {record.state}  {what}".rstrip(), err=True)
