"""`tandem evaluate`: a classifier on a split of a dataset, as a job of the trainer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.output import console, json_option, print_json, table
from tandem.cli.train import options, spec_option
from tandem.comparison.predictions import EVALUATION_FILE, PREDICTIONS_FILE
from tandem.errors import CheckpointCorrupt, InvalidJob, InvalidRequest
from tandem.jobs.spec import EvaluationJob, make_spec

if TYPE_CHECKING:
    from tandem.jobs.record import JobRecord
    from tandem.volume import Volume

_WORST = 5


@click.command()
@options(
    click.argument("model", metavar="REF"),
    click.option("--data", "dataset", required=True, help="A prepared image dataset ('tandem data list')."),
    spec_option(EvaluationJob, "split", "The split of --data."),
    spec_option(EvaluationJob, "flip", "Also say how right the mean over each image and its mirror image is."),
    spec_option(EvaluationJob, "batch_size", "Images at a time."),
    spec_option(EvaluationJob, "precision", "bfloat16 computes under autocast; auto takes it where the device has it."),
    spec_option(EvaluationJob, "device", "auto, cpu, cuda or cuda:N."),
    spec_option(EvaluationJob, "num_threads", "CPU threads; all cores if left out."),
    spec_option(EvaluationJob, "limit_images", "So many images, spread evenly over the split.", "--limit"),
    spec_option(EvaluationJob, "top_k", "Classes for each image in the predictions file."),
    click.option("--output", type=click.Path(path_type=Path), help="Copy the predictions file to this path."),
    click.option("--no-follow", is_flag=True, help="Print the run_id at once; 'tandem runs watch' shows the run."),
    json_option,
)
def evaluate(output: Path | None, no_follow: bool, as_json: bool, **values: Any) -> None:
    """Evaluate classifier REF (name, name:version, name@alias or run:ID/STEP) on a split of a dataset.

    It is a run of the trainer, as training is; Ctrl-C leaves it going. Says accuracy@1 and @5 in percent, the mean
    loss in nats, and the expected calibration error, and writes a predictions file, which 'tandem compare' reads.
    --json prints {run_id, predictions, model, dataset, split, precision, num_images, acc1, acc5, loss, ece, flip,
    per_class, reliability}.
    """
    _check_output(output, no_follow)
    try:
        given = {name: value for name, value in values.items() if value is not None}
        spec = make_spec({"kind": "evaluate_classifier", **given})
    except InvalidJob as error:
        raise click.UsageError(str(error)) from None
    assert isinstance(spec, EvaluationJob)
    record, volume = _run(spec, follow=not no_follow, as_json=as_json)
    if no_follow:
        return
    predictions = _copied(volume.run(record.run_id) / PREDICTIONS_FILE, output)
    document = {"run_id": record.run_id, "predictions": str(predictions), **_read_evaluation(volume, record.run_id)}
    if as_json:
        print_json(document)
    else:
        _print_report(document)


def _check_output(output: Path | None, no_follow: bool) -> None:
    if output is None:
        return
    if no_follow:
        raise click.UsageError("--output needs the end of the run; leave out --no-follow")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise click.UsageError(f"--output {output}: give the path of a file, in a folder that exists")


def _run(spec: EvaluationJob, follow: bool, as_json: bool) -> "tuple[JobRecord, Volume]":
    """Submit the run, and follow it to its end unless told not to; return its last record."""
    from tandem.cli.connections import celery_app, job_store
    from tandem.cli.follow import follow_run
    from tandem.jobs.runs import submit
    from tandem.settings import Settings
    from tandem.volume import Volume

    settings = Settings.from_environment()
    volume, store = Volume(settings.home), job_store(settings)
    record = submit(spec, volume, store, celery_app(settings))
    if follow:
        return follow_run(record.run_id, volume, store, quiet=as_json), volume
    if as_json:
        print_json({"run_id": record.run_id})
    else:
        click.echo(f"run {record.run_id} is queued: {record.model_name} on {spec.dataset}/{spec.split}")
        click.echo(f"  tandem runs watch {record.run_id}    follows it")
    return record, volume


def _copied(predictions: Path, output: Path | None) -> Path:
    from tandem.volume import replace_file

    if output is None:
        return predictions
    try:
        replace_file(output, predictions.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"can't write {output}: {error.strerror}; the predictions are at {predictions}") from error
    return output.absolute()


def _read_evaluation(volume: "Volume", run_id: str) -> dict[str, Any]:
    path = volume.run(run_id) / EVALUATION_FILE
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointCorrupt(f"{path} can't be read: {error}; evaluate again") from error
    return found


def _print_report(document: dict[str, Any]) -> None:
    lines = table("", "accuracy@1", "accuracy@5", "loss", "calibration error")
    lines.add_row(document["model"], *_figures(document))
    if document["flip"]:
        lines.add_row("  with mirror images", *_figures(document["flip"]))
    click.echo(f"\non {document['num_images']:,} images of {document['dataset']}/{document['split']}:\n")
    console().print(lines)
    worst = table("worst classes", "", "accuracy@1", "images")
    for each in sorted(document["per_class"], key=lambda each: (each["acc1"], -each["num_images"]))[:_WORST]:
        worst.add_row(each["words"], each["id"], f"{each['acc1']:.1f} %", f"{each['num_images']:,}")
    click.echo()
    console().print(worst)
    click.echo(f"\npredictions: {document['predictions']}")


def _figures(metrics: dict[str, Any]) -> tuple[str, str, str, str]:
    percents = (f"{metrics['acc1']:.2f} %", f"{metrics['acc5']:.2f} %")
    return *percents, f"{metrics['loss']:.4f}", f"{metrics['ece']:.4f}"
