"""`tandem classify`: the best classes of images."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tandem.cli.calls import bar, name_of, open_client, read_images, scored_documents, version_document
from tandem.cli.output import json_option, print_json
from tandem.errors import InvalidImage

if TYPE_CHECKING:
    from tandem.client import Classification, ImageResult


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes for each image.")
@json_option
def classify(reference: str, images: tuple[Path, ...], top_k: int, as_json: bool) -> None:
    """Classify images with model REF: name, name:version, name@alias or run:RUN[/STEP].

    A file that is missing or can't be read is refused before anything is sent. Exits 1 if one does not decode, after
    the others are answered. --json prints
    {model, results: [{file, top_k: [{index, id, words, probability}], error}], timings}.
    """
    sources = read_images(images)
    with open_client() as client:
        answer = client.classify(reference, sources, top_k)
    if as_json:
        _print_document(answer)
    else:
        _print_results(answer)
    failed = [result for result in answer.results if result.error]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise InvalidImage(f"{failed[0].name}: {failed[0].error}{more}")


def _print_document(answer: "Classification") -> None:
    results = [
        {"file": result.name, "top_k": scored_documents(result.top_k), "error": result.error or None}
        for result in answer.results
    ]
    timings = {
        "decode_ms": answer.timings.decode_ms,
        "queue_ms": answer.timings.queue_ms,
        "compute_ms": answer.timings.compute_ms,
    }
    print_json({"model": version_document(answer.model), "results": results, "timings": timings})


def _print_results(answer: "Classification") -> None:
    click.echo(f"{answer.model.label} ({answer.model.architecture}, {answer.model.dtype})")
    width = max((len(name_of(each)) for result in answer.results for each in result.top_k), default=0)
    for result in answer.results:
        click.echo(f"\n{result.name}")
        _print_classes(result, width)


def _print_classes(result: "ImageResult", width: int) -> None:
    if result.error:
        click.echo(f"  {result.error}")
    for scored in result.top_k:
        click.echo(f"  {name_of(scored):<{width}}  {scored.probability:6.1%}  {bar(scored.probability)}".rstrip())
