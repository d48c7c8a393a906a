"""`tandem evaluate`: a classifier or a language model on a split of a dataset, as a job of the trainer."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.evaluate_text import TEXT_OPTIONS, check_options, default_of_rules, prefixes, print_text_report
from tandem.cli.output import console, json_option, open_volume, print_json, table
from tandem.cli.scheduling import scheduling_options, take_scheduling
from tandem.cli.train import options, spec_option
from tandem.comparison.predictions import EVALUATION_FILE, PREDICTIONS_FILE
from tandem.comparison.token_losses import LOSSES_FILE
from tandem.data.manifest import read_dataset
from tandem.errors import CheckpointCorrupt, InvalidJob, InvalidRequest, NotFound
from tandem.jobs.scheduling import Scheduling
from tandem.jobs.spec import EvaluationJob, TextEvaluationJob, make_spec
from tandem.jobs.text_checks import read_card

if TYPE_CHECKING:
    from tandem.jobs.record import JobRecord
    from tandem.volume import Volume

_WORST = 5

Spec = EvaluationJob | TextEvaluationJob


@click.command()
@options(
    click.argument("model", metavar="REF"),
    click.option("--data", "dataset", required=True, help="A prepared dataset ('tandem data list')."),
    click.option("--split", help="The split of --data.  [default: val; of a text test, or valid if it has no test]"),
    click.option(
        "--limit", type=int, help="So many images, spread evenly over the split; or the first so many tokens."
    ),
    spec_option(EvaluationJob, "precision", "bfloat16 computes under autocast; auto takes it where the device has it."),
    spec_option(EvaluationJob, "device", "auto, cpu, cuda or cuda:N."),
    spec_option(EvaluationJob, "num_threads", "CPU threads; all cores if left out."),
    spec_option(EvaluationJob, "flip", "Of a classifier: also take the mean over each image and its mirror image."),
    spec_option(EvaluationJob, "batch_size", "Of a classifier: images at a time."),
    spec_option(EvaluationJob, "top_k", "Of a classifier: classes for each image in the predictions file."),
    spec_option(TextEvaluationJob, "mode", "Of a language model: plain, and beside it with a cache, or dynamic."),
    spec_option(TextEvaluationJob, "window", "Of a language model: tokens at a time; changes no result."),
    spec_option(TextEvaluationJob, "cache_window", "Earlier states that --mode cache looks at."),
    spec_option(TextEvaluationJob, "cache_theta", "Of --mode cache: what the dot product of two states is times."),
    spec_option(TextEvaluationJob, "cache_lambda", "Of --mode cache: its share of the mixture."),
    spec_option(TextEvaluationJob, "dynamic_rule", "Of --mode dynamic: gradients over their usual size, or plain SGD."),
    spec_option(TextEvaluationJob, "dynamic_segment", "Of --mode dynamic: tokens from one step to the next."),
    spec_option(
        TextEvaluationJob,
        "dynamic_rate",
        f"Of --mode dynamic: learning rate.  [default: {default_of_rules('dynamic_rate')}]",
    ),
    spec_option(
        TextEvaluationJob,
        "dynamic_decay",
        f"Of --mode dynamic: the pull back to the trained weights.  [default: {default_of_rules('dynamic_decay')}]",
    ),
    spec_option(
        TextEvaluationJob, "dynamic_statistics", "Of --dynamic-rule rms: train tokens to learn those sizes from."
    ),
    click.option(
        "--output", type=click.Path(path_type=Path), help="Copy the predictions (or token losses) to this path."
    ),
    scheduling_options,
    click.option("--no-follow", is_flag=True, help="Print the run_id at once; 'tandem runs watch' shows the run."),
    json_option,
)
def evaluate(output: Path | None, no_follow: bool, as_json: bool, **values: Any) -> None:
    """Evaluate model REF (name, name:version, name@alias or run:ID/STEP) on a split of a dataset.

    It is a run of the trainer, as training is; Ctrl-C leaves it going.

    Of a classifier: accuracy@1 and @5 in percent, the mean loss in nats, and the expected calibration error, and a
    predictions file, which 'tandem compare' reads. --json prints {run_id, predictions, model, dataset, split,
    precision, num_images, acc1, acc5, loss, ece, flip, per_class, reliability}.

    Of a language model: the mean loss in nats a token and the perplexity, and the loss of each token in a file. --mode
    cache mixes in words said lately (Grave et al. 2016); --mode dynamic lets the weights learn from what they have been
    scored on (Krause et al. 2018); both say the plain perplexity too. --json prints {run_id, token_losses, model,
    dataset, split, mode, parameters, num_tokens, loss, ppl, word_ppl, bits_per_byte, cache_ppl or dynamic_ppl …}.
    """
    _check_output(output, no_follow)
    scheduling = take_scheduling(values)
    spec = _spec({name: value for name, value in values.items() if value is not None})
    record, volume = _run(spec, scheduling, follow=not no_follow, as_json=as_json)
    if no_follow:
        return
    document = _results(spec, volume, record.run_id, output)
    if as_json:
        print_json(document)
    elif isinstance(spec, TextEvaluationJob):
        print_text_report(document)
    else:
        _print_report(document)


def _spec(given: dict[str, Any]) -> Spec:
    """Return the job for a model of REF's kind; raise UsageError for values, or options, that it can't have."""
    kind = _kind(given)
    check_options(given, kind)
    if "limit" in given:
        given["limit_images" if kind == "classifier" else "limit_tokens"] = given.pop("limit")
    try:
        spec = make_spec({"kind": f"evaluate_{kind}", **given})
    except InvalidJob as error:
        raise click.UsageError(str(error)) from None
    assert isinstance(spec, Spec)
    return spec


def _kind(given: dict[str, Any]) -> str:
    volume = open_volume()
    # A model or dataset that is not there is said in its turn, after wrong usage; till then the rest tells the kind.
    with suppress(NotFound, InvalidRequest):
        return read_card(given["model"], volume)[1].kind
    with suppress(NotFound, InvalidRequest):
        return {"text": "language_model", "images": "classifier"}[read_dataset(volume, given["dataset"]).kind]
    return "language_model" if TEXT_OPTIONS & given.keys() else "classifier"


def _results(spec: Spec, volume: "Volume", run_id: str, output: Path | None) -> dict[str, Any]:
    """Return what --json prints; copy the run's main file to `output`, if given."""
    run, evaluation = volume.run(run_id), _read_evaluation(volume, run_id)
    if isinstance(spec, EvaluationJob):
        return {"run_id": run_id, "predictions": str(_copied(run / PREDICTIONS_FILE, output)), **evaluation}
    files = {f"{prefix}token_losses": run / f"{prefix}{LOSSES_FILE}" for prefix in prefixes(evaluation["mode"])}
    last = list(files)[-1]
    files[last] = _copied(files[last], output)
    return {"run_id": run_id, **{name: str(path) for name, path in files.items()}, **evaluation}


def _check_output(output: Path | None, no_follow: bool) -> None:
    if output is None:
        return
    if no_follow:
        raise click.UsageError("--output needs the end of the run; leave out --no-follow")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise click.UsageError(f"--output {output}: give the path of a file, in a folder that exists")


def _run(spec: Spec, scheduling: Scheduling, follow: bool, as_json: bool) -> "tuple[JobRecord, Volume]":
    """Submit the run, and follow it to its end unless told not to; return its last record."""
    from tandem.cli.connections import celery_app, job_store
    from tandem.cli.follow import follow_run
    from tandem.jobs.submit import submit
    from tandem.settings import Settings
    from tandem.volume import Volume

    settings = Settings.from_environment()
    volume, store = Volume(settings.home, settings.checkpoint_store), job_store(settings)
    record = submit(spec, volume, store, celery_app(settings), scheduling)
    if follow:
        return follow_run(record.run_id, volume, store, quiet=as_json), volume
    if as_json:
        print_json({"run_id": record.run_id})
    else:
        split = f"/{spec.split}" if spec.split else ""
        click.echo(f"run {record.run_id} is {record.state.lower()}: {record.model_name} on {spec.dataset}{split}")
        click.echo(f"  tandem runs watch {record.run_id}    follows it")
    return record, volume


def _copied(results: Path, output: Path | None) -> Path:
    from tandem.volume import replace_file

    if output is None:
        return results
    try:
        replace_file(output, results.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"can't write {output}: {error.strerror}; the results are at {results}") from error
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
