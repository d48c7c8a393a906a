"""`tandem runs`: list, show, watch, read the log of, cancel, pause, resume and remove runs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tandem.cli.connections import celery_app, job_store, optional_job_store
from tandem.cli.follow import follow_run, metrics_text, progress_text
from tandem.cli.output import console, json_option, print_json, table
from tandem.cli.sweep import show_sweep
from tandem.errors import Conflict, RunNotFound
from tandem.jobs.record import JobRecord, State
from tandem.jobs.removal import remove_run
from tandem.jobs.runs import MODEL_KINDS, find_run, list_runs
from tandem.jobs.runs import cancel as cancel_run
from tandem.jobs.runs import pause as pause_run
from tandem.jobs.runs import resume as resume_run
from tandem.settings import Settings
from tandem.volume import Volume

_LOG_POLL_S = 0.3


def _context() -> tuple[Settings, Volume]:
    settings = Settings.from_environment()
    return settings, Volume(settings.home, settings.checkpoint_store)


@click.group()
def runs() -> None:
    """Runs, the newest first; RUN is a run_id, or 'latest'."""


@runs.command(name="list")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="The newest so many.")
@click.option("--all", "all_", is_flag=True, help="All of them.")
@click.option("--sweep", help="Those of a sweep, the best first, with what was varied.")
@json_option
def list_(limit: int, all_: bool, sweep: str | None, as_json: bool) -> None:
    """List runs with their state and progress."""
    settings, volume = _context()
    newest = None if all_ or sweep else limit
    records = list_runs(volume, lambda: optional_job_store(settings), newest, sweep)
    if sweep and not records:
        raise RunNotFound(f"no run of a sweep {sweep!r} on the volume; 'tandem runs list' shows the runs")
    if sweep:
        show_sweep(records, as_json)
    elif as_json:
        print_json([record.document() for record in records])
    elif not records:
        click.echo("no runs yet; 'tandem train' submits one")
    else:
        _print_table(records)


def _print_table(records: list[JobRecord]) -> None:
    result = table("run", "state", "model", "data", "progress", "metrics")
    for record in records:
        progress = record.progress
        done = "" if progress.percent is None else f"{progress.percent:.0f} %"
        metrics = {name: value for name, value in progress.metrics.items() if name.startswith("val")}
        shown = metrics_text(metrics or progress.metrics)
        result.add_row(record.run_id, record.state, record.model_name, record.dataset, done, shown)
    console().print(result)


@runs.command()
@click.argument("run")
@json_option
def show(run: str, as_json: bool) -> None:
    """Show what is known of a run."""
    settings, volume = _context()
    record = find_run(run, volume, optional_job_store(settings))
    directory = volume.run(record.run_id)
    if as_json:
        print_json({**record.document(), "directory": str(directory)})
        return
    result = table("", "")
    result.show_header = False
    for name, value in _facts(record, directory):
        result.add_row(name, value)
    console().print(result)


def _facts(record: JobRecord, directory: Path) -> list[tuple[str, str]]:
    facts = [
        ("run", record.run_id),
        ("state", f"{record.state} {record.message}".strip()),
        ("kind", record.kind),
        ("data", record.dataset),
        ("model", record.model_name + (f":{record.model_version}" if record.model_version else "")),
        ("attempt", str(record.attempt) + _failures_text(record)),
        ("queue", f"{record.queue}, {record.priority}"),
        ("progress", progress_text(record)),
        ("computed", f"{record.spent_s:.0f} s" + (f" of {record.time_limit_s:g}" if record.time_limit_s else "")),
        ("after", ", ".join(record.after)),
        ("sweep", record.sweep or ""),
        ("submitted", record.submitted_at),
        ("started", record.started_at or ""),
        ("finished", record.finished_at or ""),
        ("directory", str(directory)),
    ]
    facts += [(name, f"{value:.5g}") for name, value in sorted(record.progress.metrics.items())]
    return [(name, value) for name, value in facts if value]


def _failures_text(record: JobRecord) -> str:
    return f" ({record.failures} of at most {record.max_failures} failures in a row)" if record.failures else ""


@runs.command()
@click.argument("run")
@json_option
def watch(run: str, as_json: bool) -> None:
    """Follow a run until it ends; Ctrl-C leaves it going."""
    settings, volume = _context()
    store = optional_job_store(settings)
    follow_run(find_run(run, volume, store).run_id, volume, store, as_json)


@runs.command()
@click.argument("run")
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends.")
@json_option
def logs(run: str, follow: bool, as_json: bool) -> None:
    """Print what the training process logged (--json: its events, as JSON lines)."""
    settings, volume = _context()
    store = optional_job_store(settings)
    run_id = find_run(run, volume, store).run_id
    path = volume.run(run_id) / ("events.jsonl" if as_json else "log.txt")
    if not path.is_file() and not follow:
        raise RunNotFound(f"run {run_id} has logged nothing yet; it has not begun")
    position = _print_from(path, 0)
    while follow and not find_run(run_id, volume, store).state.is_settled:
        time.sleep(_LOG_POLL_S)
        position = _print_from(path, position)
    _print_from(path, position)


def _print_from(path: Path, position: int) -> int:
    """Print a log from byte `position` on; return where it ends now."""
    if not path.is_file():
        return position
    with open(path, "rb") as file:
        file.seek(position)
        data = file.read()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return position + len(data)


def _several(runs: tuple[str, ...], sweep: str | None, volume: Volume, settings: Settings) -> list[str]:
    """Return the runs that a command is for: those named, or those of a sweep that have not ended."""
    if bool(runs) == bool(sweep):
        raise click.UsageError("name runs, or give --sweep")
    if not sweep:
        return list(runs)
    records = list_runs(volume, lambda: optional_job_store(settings), sweep=sweep)
    if not records:
        raise RunNotFound(f"no run of a sweep {sweep!r} on the volume; 'tandem runs list' shows the runs")
    return [record.run_id for record in records if record.state is not State.SUCCEEDED]


def _say(records: list[JobRecord], sweep: str | None, as_json: bool) -> None:
    if as_json:
        documents = [record.document() for record in records]
        print_json(documents[0] if len(documents) == 1 and not sweep else documents)
        return
    for record in records:
        click.echo(_standing(record))


def _standing(record: JobRecord) -> str:
    if record.state is State.RUNNING and record.stop_requested:
        saves = "save a checkpoint and " if record.kind in MODEL_KINDS else ""
        end = {"cancel": "end", "pause": "give its place back"}[record.stop_requested]
        return f"run {record.run_id} will {saves}{end}"
    return f"run {record.run_id} is {record.state}"


def _await(record: JobRecord, volume: Volume, settings: Settings) -> JobRecord:
    store = job_store(settings)
    while record.stop_requested and not record.state.is_settled:
        time.sleep(_LOG_POLL_S)
        record = find_run(record.run_id, volume, store)
    return record


_WAIT = click.option("--wait", is_flag=True, help="Return when the run has saved and stopped.")
_SWEEP = click.option("--sweep", help="All runs of this sweep that have not ended.")


@runs.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@_SWEEP
@_WAIT
@json_option
def cancel(runs: tuple[str, ...], sweep: str | None, wait: bool, as_json: bool) -> None:
    """End runs; one that trains saves a checkpoint first."""
    _stop(cancel_run, runs, sweep, wait, as_json)


@runs.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@_SWEEP
@_WAIT
@json_option
def pause(runs: tuple[str, ...], sweep: str | None, wait: bool, as_json: bool) -> None:
    """Have runs give their places back; one that trains saves a checkpoint first. 'runs resume' takes them up again."""
    _stop(pause_run, runs, sweep, wait, as_json)


@runs.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also where a model of the registry or another run needs its checkpoints.")
@json_option
def remove(runs: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Remove ended runs with all their files: checkpoints, log, curves."""
    settings, volume = _context()
    store = optional_job_store(settings)
    removed = []
    for run in runs:
        removed.append(remove_run(run, volume, store, force))
        if not as_json:
            click.echo(f"run {removed[-1]} is removed")
    if as_json:
        print_json({"removed": removed})


def _stop(ask: Any, runs: tuple[str, ...], sweep: str | None, wait: bool, as_json: bool) -> None:
    settings, volume = _context()
    store = job_store(settings)
    asked = []
    for run_id in _several(runs, sweep, volume, settings):
        with _unless_ended(sweep):
            asked.append(ask(run_id, volume, store))
            if not as_json and not wait:
                # Each as it is done: the next may be refused.
                click.echo(_standing(asked[-1]))
    if as_json or wait:
        _say([_await(record, volume, settings) if wait else record for record in asked], sweep, as_json)


@contextmanager
def _unless_ended(sweep: str | None) -> Iterator[None]:
    """Of a sweep, a run may end or be in the wished state at any moment; that is no error there."""
    try:
        yield
    except Conflict:
        if not sweep:
            raise


@runs.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1)
@_SWEEP
@json_option
def resume(runs: tuple[str, ...], sweep: str | None, as_json: bool) -> None:
    """Queue failed, canceled or paused runs again; one that trains goes on from its newest checkpoint."""
    settings, volume = _context()
    store, app = job_store(settings), celery_app(settings)
    records = []
    for run_id in _several(runs, sweep, volume, settings):
        with _unless_ended(sweep):
            records.append(resume_run(run_id, volume, store, app))
    _say(records, sweep, as_json)
