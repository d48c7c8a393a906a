"""`tandem compare`: two classifiers on the same images, or what two evaluations have predicted."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.calls import name_of, open_client, printable, read_images, scored_documents, version_document
from tandem.cli.compare_texts import compare_texts
from tandem.cli.comparison_page import file_images, num_page_images, predicted_dataset, volume_images, write_page
from tandem.cli.output import check_output, console, json_option, open_volume, print_json, table
from tandem.comparison.evidence import ALPHA, ClassDifference, Evidence, Standing, verdict
from tandem.comparison.paired import agreement
from tandem.errors import InvalidImage, InvalidRequest

if TYPE_CHECKING:
    from tandem.client import Client, Comparison, ScoredClass
    from tandem.comparison.results import ComparisonSummary, ModelVersion
    from tandem.jobs.record import JobRecord

# A person reads some; --json has them all.
_SHOWN = 40


@click.command()
@click.argument("reference_a", metavar="REF_A")
@click.argument("reference_b", metavar="REF_B")
@click.argument("images", metavar="[IMAGE...]", nargs=-1, type=click.Path(path_type=Path))
@click.option("--data", "dataset", metavar="D", help="Compare on a dataset of the server's volume instead.")
@click.option("--split", help="The split of --data.  [default: val]")
@click.option("--limit", type=click.IntRange(1), help="So many images, spread evenly over the split.")
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes for each image.")
@click.option("--labels-from-folders", is_flag=True, help="An IMAGE's folder names its true class.")
@click.option(
    "--report", metavar="FILE.html", type=click.Path(path_type=Path), help="Write a page with all of it, too."
)
@json_option
def compare(
    reference_a: str,
    reference_b: str,
    images: tuple[Path, ...],
    dataset: str | None,
    split: str | None,
    limit: int | None,
    top_k: int,
    labels_from_folders: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Compare models REF_A and REF_B on IMAGEs, or on a split of a dataset; or two predictions files.

    --report writes one page that needs no network: the verdict, the figures, the classes that differ, and the images
    that the two name differently. Those of a dataset come from the server; those of predictions files from the dataset
    on this machine's volume, where it is there.

    The files are what 'tandem evaluate' writes: give them as REF_A and REF_B, by their paths or as run:ID of the
    evaluation; no server is needed. Two evaluations of language models, as run:ID, are compared token by token:
    perplexities, their difference with a 95 % interval, and the tokens that differ most.

    Says where the two name different classes and, where the true classes are known, which is more often right, with
    McNemar's test, 95 % intervals, and the classes that differ. --json prints {num_images, num_disagreements,
    num_errors, agreement, kappa, divergence_bits, verdict, a, b, difference, mcnemar, classes, only_in_a, only_in_b,
    disagreements, errors}; difference, mcnemar and classes are null where no true class is known.
    """
    if report is not None:
        check_output(report)
    if not (images or dataset) and (runs := _text_evaluations(reference_a, reference_b)):
        if report or limit or labels_from_folders or split:
            raise click.UsageError("--report, --limit, --split and --labels-from-folders are for classifiers")
        compare_texts(*runs, as_json)
        return
    files = None if images or dataset else _predictions_files(reference_a, reference_b)
    if files:
        if limit or labels_from_folders or split:
            raise click.UsageError("--limit, --split and --labels-from-folders don't go with predictions files")
        answer = _from_files(*files, max(top_k, 5) if report else top_k)
        _show(answer, as_json)
        if report is not None:
            write_page(report, answer, volume_images(predicted_dataset(files[0])))
        return
    _check_usage(images, dataset, bool(limit or split), labels_from_folders)
    sources = read_images(images, lambda path: path.absolute().parent.name if labels_from_folders else "")
    if report is not None:
        # The page shows the five likeliest.
        top_k = max(top_k, 5)
    with open_client() as client:
        if dataset is None:
            answer = client.compare(reference_a, reference_b, sources, top_k)
        else:
            references, num_shown = (reference_a, reference_b), num_page_images() if report else 0
            answer = on_dataset(client, references, dataset, split or "val", top_k, limit or 0, num_shown)
    _show(answer, as_json)
    if report is not None:
        write_page(report, answer, file_images(images) if dataset is None else answer.images.get)
    # Of a dataset, images that can't be read are counted and listed; those named by hand must be right.
    if dataset is None and answer.failures:
        first = answer.failures[0]
        raise InvalidImage(f"{first.name}: {first.error} ({len(answer.failures)} of {len(answer.results)} failed)")


def _show(answer: "Comparison", as_json: bool) -> None:
    if as_json:
        print_json(document(answer))
    else:
        _print_report(answer)


def _text_evaluations(argument_a: str, argument_b: str) -> tuple[Path, Path] | None:
    """Return the runs where both arguments name evaluations of language models, as run:ID; else None."""
    a, b = _evaluation(argument_a), _evaluation(argument_b)
    if a is None or b is None or {a.kind, b.kind} != {"evaluate_language_model"}:
        return None
    volume = open_volume()
    return volume.run(a.run_id), volume.run(b.run_id)


def _evaluation(argument: str) -> "JobRecord | None":
    """Return the record of the evaluation that `argument` names, as run:ID; None for anything else."""
    from tandem.checkpoints.references import RunReference, parse_reference
    from tandem.jobs.runs import MODEL_KINDS, read_mirror

    if Path(argument).is_file() or Path(argument).suffix == ".jsonl":
        return None
    reference = parse_reference(argument)
    if not isinstance(reference, RunReference) or reference.step is not None:
        return None
    record = read_mirror(open_volume().run(reference.run_id))
    return None if record is None or record.kind in MODEL_KINDS else record


def _predictions_files(argument_a: str, argument_b: str) -> tuple[Path, Path] | None:
    """Return the predictions files that both arguments name, None where neither does; one alone is an error."""
    a, b = _predictions_file(argument_a), _predictions_file(argument_b)
    if a and b:
        return a, b
    if a or b:
        other = argument_b if a else argument_a
        raise InvalidRequest(f"{other!r} is no predictions file, as the other is; 'tandem evaluate' writes them")
    return None


def _predictions_file(argument: str) -> Path | None:
    """Return the file that `argument` names, by its path or as run:ID of an evaluation; None for other references."""
    from tandem.comparison.predictions import PREDICTIONS_FILE

    if (path := Path(argument)).is_file():
        return path
    if path.suffix == ".jsonl":
        raise InvalidRequest(f"there is no predictions file {printable(path)}")
    record = _evaluation(argument)
    if record is None:
        return None
    if record.kind == "evaluate_language_model":
        raise InvalidRequest(f"evaluation {record.run_id} is of a language model; predictions are of classifiers")
    predictions = open_volume().run(record.run_id) / PREDICTIONS_FILE
    if not predictions.is_file():
        raise InvalidRequest(f"evaluation {record.run_id} has no predictions; it is {record.state}")
    return predictions


def _from_files(path_a: Path, path_b: Path, top_k: int) -> "Comparison":
    from tandem.comparison.predictions import compare_predictions

    return compare_predictions(path_a, path_b, top_k)


def _check_usage(images: Sequence[Path], dataset: str | None, has_part: bool, labels_from_folders: bool) -> None:
    if bool(images) == bool(dataset):
        raise click.UsageError("give either IMAGEs or --data, one of the two; or two predictions files as REFs")
    if dataset and labels_from_folders:
        raise click.UsageError("--labels-from-folders goes with IMAGEs; a dataset knows its labels")
    if images and has_part:
        raise click.UsageError("--limit and --split go with --data")


def on_dataset(
    client: "Client",
    references: tuple[str, str],
    dataset: str,
    split: str,
    top_k: int,
    limit: int,
    num_returned_images: int = 0,
) -> "Comparison":
    """Compare on a split of a dataset of the server's volume, with a progress bar."""
    from tandem.cli.progress import BarProgress
    from tandem.comparison.results import Comparison

    with BarProgress() as progress:
        num_done: int | None = None
        for step in client.compare_dataset(*references, dataset, split, top_k, limit, num_returned_images):
            if isinstance(step, Comparison):
                return step
            if num_done is None:
                progress.start(f"comparing on {dataset}/{split}", step.num_images)
            progress.advance(step.num_done - (num_done or 0))
            num_done = step.num_done
    raise AssertionError("the stream ended without its last message")


def document(answer: "Comparison") -> dict[str, Any]:
    """Return the JSON of a comparison."""
    evidence = answer.summary.evidence
    return {
        **summary_document(answer.summary),
        "disagreements": [
            {
                "file": each.name,
                "label": each.label or None,
                "divergence_bits": each.divergence if evidence and evidence.divergence is not None else None,
                "a": _answer(each.a),
                "b": _answer(each.b),
            }
            for each in answer.ranked
        ],
        "errors": [{"file": each.name, "error": each.error} for each in answer.failures],
    }


def summary_document(summary: "ComparisonSummary") -> dict[str, Any]:
    """Return the JSON of what a comparison found over all images."""
    known, evidence = summary.labelled, summary.evidence
    mcnemar = known and {
        "exact_p": known.exact_p,
        "mid_p": known.mid_p,
        "only_a_right": known.only_a_right,
        "only_b_right": known.only_b_right,
        "both_right": known.both_right,
        "both_wrong": known.both_wrong,
        "num_labelled": known.num_examples,
    }
    found = evidence.labelled if evidence else None
    return {
        "num_images": summary.num_images,
        "num_disagreements": summary.num_disagreements,
        "num_errors": summary.num_errors,
        "agreement": agreement(summary.num_disagreements, summary.num_images) if summary.num_images else None,
        "kappa": evidence.kappa if evidence else None,
        "divergence_bits": evidence.divergence if evidence else None,
        "verdict": verdict(evidence, summary.a.label, summary.b.label) if evidence else None,
        "a": {**_side(summary.a, found.a if found else None), "accuracy": known.accuracy_a if known else None},
        "b": {**_side(summary.b, found.b if found else None), "accuracy": known.accuracy_b if known else None},
        "difference": found and {"value": found.difference, "interval": [*found.interval]},
        "mcnemar": mcnemar,
        "classes": [_class(each) for each in found.by_class] if found else None,
        "only_in_a": [*evidence.only_in_a] if evidence else [],
        "only_in_b": [*evidence.only_in_b] if evidence else [],
    }


def _side(version: "ModelVersion", standing: Standing | None) -> dict[str, Any]:
    if standing is None:
        return version_document(version)
    return {
        **version_document(version),
        "accuracy_interval": [*standing.top_1.interval],
        "accuracy_at_5": standing.top_5.value,
        "accuracy_at_5_interval": [*standing.top_5.interval],
        "calibration_error": standing.calibration_error,
    }


def _class(each: ClassDifference) -> dict[str, Any]:
    return {
        "id": each.id,
        "num_images": each.table.num_examples,
        "accuracy_a": each.table.accuracy_a,
        "accuracy_b": each.table.accuracy_b,
        "mid_p": each.p,
        "adjusted_p": each.adjusted_p,
    }


def _answer(scored: "Sequence[ScoredClass]") -> dict[str, Any]:
    best = scored[0]
    answer = {"id": best.id, "words": best.words, "probability": best.probability}
    return {**answer, "top_k": scored_documents(scored)}


def _print_report(answer: "Comparison") -> None:
    print_summary(answer.summary)
    if answer.failures:
        click.echo(f"{len(answer.failures):,} can't be read, the first {answer.failures[0].name}")
    _print_disagreements(answer)


def print_summary(summary: "ComparisonSummary") -> None:
    """Print what a comparison found over all images."""
    evidence, known = summary.evidence, summary.labelled
    found = evidence.labelled if evidence else None
    lines = table("", "model", "network", "accuracy", "", "accuracy@5", "", "calibration error")
    lines.add_row("a", *_row(summary.a, known.accuracy_a if known else None, found.a if found else None))
    lines.add_row("b", *_row(summary.b, known.accuracy_b if known else None, found.b if found else None))
    console().print(lines)
    click.echo()
    if summary.num_images:
        share = agreement(summary.num_disagreements, summary.num_images)
        kappa = f" (kappa {evidence.kappa:.3f})" if evidence and evidence.kappa is not None else ""
        apart = evidence.divergence if evidence else None
        bits = "" if apart is None else f"; their predictions are {apart:.3g} bits apart (Jensen-Shannon)"
        click.echo(
            f"they agree on {share:.1%} of {summary.num_images:,} images{kappa}; {summary.num_disagreements:,} differ"
            f"{bits}"
        )
    if known:
        click.echo(
            f"of {known.num_examples:,} with a known class: only a right {known.only_a_right:,}, "
            f"only b right {known.only_b_right:,}; McNemar p = {known.exact_p:.3g} (exact), {known.mid_p:.3g} (mid-p)"
        )
    if evidence:
        click.echo(verdict(evidence, summary.a.label, summary.b.label))
        _print_classes(evidence)


def _row(version: "ModelVersion", accuracy: float | None, standing: Standing | None) -> tuple[str, ...]:
    if standing is None:
        return (version.label, version.architecture, "" if accuracy is None else f"{accuracy:.2%}", "", "", "", "")
    top_1, top_5 = (
        (f"{share.value:.2%}", f"{share.interval.low:.1%} to {share.interval.high:.1%}")
        for share in (standing.top_1, standing.top_5)
    )
    return version.label, version.architecture, *top_1, *top_5, f"{standing.calibration_error:.3f}"


def _print_classes(evidence: Evidence) -> None:
    """Say which classes one model is better at, and which the other does not know."""
    for only, name, other in ((evidence.only_in_a, "a", "b"), (evidence.only_in_b, "b", "a")):
        if only:
            more = f" and {len(only) - 5} more" if len(only) > 5 else ""
            click.echo(f"{name} alone knows {', '.join(only[:5])}{more}; {other} is never right on them")
    found = evidence.labelled.by_class if evidence.labelled else ()
    differing = sorted((each for each in found if each.adjusted_p <= ALPHA), key=lambda each: each.adjusted_p)
    if len(found) > 1:
        colon = ":" if differing else ""
        click.echo(f"{len(differing)} of {len(found)} classes differ (adjusted p ≤ {ALPHA}){colon}")
    for each in differing[:_SHOWN]:
        click.echo(
            f"  {each.id}: a {each.table.accuracy_a:.1%}, b {each.table.accuracy_b:.1%} of "
            f"{each.table.num_examples:,} (adjusted p {each.adjusted_p:.2g})"
        )


def _print_disagreements(answer: "Comparison") -> None:
    if not answer.disagreements:
        return
    lines = table("image", "true class", "a says", "", "b says", "")
    for each in answer.ranked[:_SHOWN]:
        a, b = each.a[0], each.b[0]
        lines.add_row(each.name, each.label, name_of(a), f"{a.probability:.1%}", name_of(b), f"{b.probability:.1%}")
    click.echo()
    console().print(lines)
    if len(answer.disagreements) > _SHOWN:
        click.echo(f"… and {len(answer.disagreements) - _SHOWN:,} more; --json has them all")
