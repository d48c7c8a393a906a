"""Following a run: a live bar on a terminal, a plain line each few seconds elsewhere, JSON lines for programs."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tandem.cli.output import console, print_json
from tandem.errors import TrainingFailed
from tandem.jobs.record import JobRecord, State
from tandem.jobs.runs import find_run
from tandem.volume import Volume

if TYPE_CHECKING:
    from tandem.jobs.store import JobStore

_POLL_S = 0.25
_PLAIN_INTERVAL_S = 3.0
_UNITS = {
    "train_classifier": "images",
    "train_language_model": "words",
    "evaluate_classifier": "images",
    "evaluate_language_model": "words",
    "promote_classifier": "images",
    "promote_language_model": "words",
}
# What the steps of a run without epochs are.
_STEPS = {
    "evaluate_classifier": "batch",
    "evaluate_language_model": "word",
    "promote_classifier": "batch",
    "promote_language_model": "word",
}


def follow_run(
    run_id: str, volume: Volume, store: "JobStore | None", as_json: bool = False, quiet: bool = False
) -> JobRecord:
    """Show a run until it ends, and return its last record; raise TrainingFailed if it failed or was canceled.

    Ctrl-C leaves the run going, and says so. `quiet` keeps standard output clean; progress goes to stderr anyway.
    """
    records = _changes(run_id, volume, store)
    try:
        last = (
            _as_json(records) if as_json else _as_bar(records) if console(stderr=True).is_terminal else _plain(records)
        )
    except KeyboardInterrupt:
        click.echo(f"\nrun {run_id} goes on; 'tandem runs watch {run_id}' shows it again", err=True)
        raise
    if last.state is State.PAUSED:
        click.echo(f"run {run_id} is PAUSED; 'tandem runs resume {run_id}' takes it up again", err=True)
        return last
    if last.state is not State.SUCCEEDED:
        raise TrainingFailed(closing_line(last))
    if not as_json and not quiet:
        click.echo(closing_line(last))
    return last


def _changes(run_id: str, volume: Volume, store: "JobStore | None") -> Iterator[JobRecord]:
    last: JobRecord | None = None
    while True:
        record = find_run(run_id, volume, store)
        if record != last:
            yield record
        if record.state.is_settled:
            return
        last = record
        time.sleep(_POLL_S)


def _as_json(records: Iterator[JobRecord]) -> JobRecord:
    for record in records:
        print_json(record.document())
    return record


def _plain(records: Iterator[JobRecord]) -> JobRecord:
    said_at, said_epoch = -_PLAIN_INTERVAL_S, -1
    for record in records:
        is_new_epoch = "val_loss" in record.progress.metrics and record.progress.epoch != said_epoch
        if is_new_epoch or time.monotonic() - said_at >= _PLAIN_INTERVAL_S:
            click.echo(f"{record.run_id}  {record.state}  {progress_text(record)}", err=True)
            said_at = time.monotonic()
            said_epoch = record.progress.epoch if is_new_epoch else said_epoch
    return record


def _as_bar(records: Iterator[JobRecord]) -> JobRecord:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.fields[state]}"), BarColumn(bar_width=30), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("run", total=None, state="", text="")
        said_epoch = 0
        for record in records:
            progress = record.progress
            if "val_loss" in progress.metrics and progress.epoch > said_epoch:
                said_epoch = progress.epoch
                bar.console.print(f"epoch {progress.epoch}/{progress.num_epochs}  {metrics_text(progress.metrics)}")
            total = progress.num_steps or None
            bar.update(task, total=total, completed=progress.step, state=record.state, text=progress_text(record))
    return record


def progress_text(record: JobRecord) -> str:
    """Return epoch, step, metrics, rate and time left in one line."""
    progress = record.progress
    if not progress.num_steps:
        waits = {State.QUEUED: "waits for a worker", State.WAITING: "waits for other runs", State.RUNNING: "starting"}
        return record.message or waits.get(record.state, "")
    steps = f"{progress.step}/{progress.num_steps}"
    # An evaluation has no epochs: its steps are batches of images, or single words.
    parts = [f"epoch {progress.epoch}/{progress.num_epochs}", f"step {steps}"]
    parts = parts if progress.num_epochs else [f"{_STEPS[record.kind]} {steps}"]
    if not record.state.is_terminal:
        parts.insert(0, f"{progress.percent:.0f} %")
    parts.append(metrics_text(progress.metrics))
    if progress.rate:
        parts.append(f"{progress.rate:,.0f} {_UNITS[record.kind]}/s")
    if progress.time_left_s and not record.state.is_terminal:
        parts.append(f"{duration_text(progress.time_left_s)} left")
    return "  ".join(part for part in parts if part)


def metrics_text(metrics: dict[str, float]) -> str:
    """Return the metrics a person looks at: loss, and accuracy or perplexity, of val where it is known."""
    shown = [("train_loss", "loss {:.3f}"), ("train_acc1", "acc {:.1f} %"), ("train_ppl", "ppl {:.1f}")]
    shown += [("val_loss", "val loss {:.3f}"), ("val_acc1", "val acc {:.1f} %"), ("val_ppl", "val ppl {:.1f}")]
    shown += [("acc1", "acc@1 {:.2f} %"), ("acc5", "acc@5 {:.2f} %"), ("loss", "loss {:.3f}")]
    shown += [("ece", "calibration error {:.3f}"), ("flip_acc1", "with mirror images acc@1 {:.2f} %")]
    shown += [("ppl", "ppl {:.2f}"), ("cache_ppl", "with a cache ppl {:.2f}"), ("dynamic_ppl", "dynamic ppl {:.2f}")]
    return "  ".join(text.format(metrics[name]) for name, text in shown if name in metrics)


def duration_text(seconds: float) -> str:
    """Return 8 s, 2:05 min or 3:20 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def closing_line(record: JobRecord) -> str:
    """Return how a run ended, in one line."""
    if record.state is State.SUCCEEDED:
        metrics = record.progress.metrics
        if record.message:
            return f"run {record.run_id} SUCCEEDED: {record.message}"
        if record.model_version is None:
            return f"run {record.run_id} SUCCEEDED: {record.model_name} on {record.dataset}  {metrics_text(metrics)}"
        test = f"  test ppl {metrics['test_ppl']:.1f}" if "test_ppl" in metrics else ""
        results = metrics_text({name: value for name, value in metrics.items() if name.startswith("val")})
        return f"run {record.run_id} SUCCEEDED: {record.model_name}:{record.model_version}  {results}{test}"
    return f"run {record.run_id} {record.state}" + (f": {record.message}" if record.message else "")
