"""`tandem runs`: list, show, watch, read the log of, cancel and resume runs."""

import sys
import time
from pathlib import Path

import click

from tandem.cli.connections import celery_app, job_store, optional_job_store
from tandem.cli.follow import follow_run, metrics_text, progress_text
from tandem.cli.output import console, json_option, print_json, table
from tandem.errors import RunNotFound
from tandem.jobs.record import JobRecord, State
from tandem.jobs.runs import MODEL_KINDS, find_run, list_runs
from tandem.jobs.runs import cancel as cancel_run
from tandem.jobs.runs import resume as resume_run
from tandem.settings import Settings
from tandem.volume import Volume

_LOG_POLL_S = 0.3


def _context() -> tuple[Settings, Volume]:
    settings = Settings.from_environment()
    return settings, Volume(settings.home)


@click.group()
def runs() -> None:
    """Runs, the newest first; RUN is a run_id, or 'latest'."""


@runs.command(name="list")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="The newest so many.")
@json_option
def list_(limit: int, as_json: bool) -> None:
    """List runs with their state and progress."""
    settings, volume = _context()
    records = list_runs(volume, lambda: optional_job_store(settings))[:limit]
    if as_json:
        print_json([record.document() for record in records])
    elif not records:
        click.echo("no runs yet; 'tandem train' submits one")
    else:
        _print_table(records)


def _print_table(records: list[JobRecord]) -> None:
    result = table("run", "state", "model", "data", "progress", "metrics")
    for record in records:
        progress = record.progress
        done = f"{100 * progress.step // progress.num_steps} %" if progress.num_steps else ""
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
        ("attempt", f"{record.attempt} of at most {record.max_attempts}"),
        ("progress", progress_text(record)),
        ("submitted", record.submitted_at),
        ("started", record.started_at or ""),
        ("finished", record.finished_at or ""),
        ("directory", str(directory)),
    ]
    facts += [(name, f"{value:.5g}") for name, value in sorted(record.progress.metrics.items())]
    return [(name, value) for name, value in facts if value]


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
    while follow and not find_run(run_id, volume, store).state.is_terminal:
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


@runs.command()
@click.argument("run")
@click.option("--wait", is_flag=True, help="Return when the run has saved and ended.")
@json_option
def cancel(run: str, wait: bool, as_json: bool) -> None:
    """End a run; one that trains saves a checkpoint first."""
    settings, volume = _context()
    store = job_store(settings)
    record = cancel_run(run, volume, store)
    while wait and not record.state.is_terminal:
        time.sleep(_LOG_POLL_S)
        record = find_run(record.run_id, volume, store)
    if as_json:
        print_json(record.document())
    elif record.state is State.CANCELED:
        click.echo(f"run {record.run_id} is CANCELED")
    else:
        saves = "save a checkpoint and " if record.kind in MODEL_KINDS else ""
        click.echo(f"run {record.run_id} will {saves}end")


@runs.command()
@click.argument("run")
@json_option
def resume(run: str, as_json: bool) -> None:
    """Queue a failed or canceled run again; one that trains goes on from its newest checkpoint."""
    settings, volume = _context()
    record = resume_run(run, volume, job_store(settings), celery_app(settings))
    if as_json:
        print_json(record.document())
    else:
        click.echo(f"run {record.run_id} is queued again")
