"""`tandem classify`: the best classes of images, told as they are answered: memory does not grow with their number."""

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.calls import bar, name_of, open_client, read_images, scored_documents, version_document
from tandem.cli.output import json_option
from tandem.errors import InvalidImage

if TYPE_CHECKING:
    from tandem.client import Classification, ImageResult, Timings


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
    printer = _Document() if as_json else _Screen()
    failures = _Failures()
    with open_client() as client, closing(client.classify_stream(reference, sources, top_k)) as answers:
        for answer in answers:
            printer.show(answer)
            failures.count(answer)
    printer.end()
    failures.tell()


class _Failures:
    """How many images did not decode, and the first of them."""

    def __init__(self) -> None:
        self._first, self._num = "", 0

    def count(self, answer: "Classification") -> None:
        for result in answer.results:
            if result.error:
                self._first = self._first or f"{result.name}: {result.error}"
                self._num += 1

    def tell(self) -> None:
        """Raise InvalidImage if there was one."""
        if self._num:
            raise InvalidImage(self._first + (f" (and {self._num - 1} more)" if self._num > 1 else ""))


class _Document:
    """One JSON document on one line, written a batch at a time."""

    def __init__(self) -> None:
        self._timings: Timings | None = None

    def show(self, answer: "Classification") -> None:
        if self._timings is None:
            _write('{"model": ' + _json(version_document(answer.model)) + ', "results": [')
        else:
            _write(", ")
        _write(", ".join(_json(_document(result)) for result in answer.results))
        self._timings = answer.timings if self._timings is None else self._timings + answer.timings

    def end(self) -> None:
        if (timings := self._timings) is not None:
            told = {"decode_ms": timings.decode_ms, "queue_ms": timings.queue_ms, "compute_ms": timings.compute_ms}
            _write('], "timings": ' + _json(told) + "}\n")


def _document(result: "ImageResult") -> dict[str, Any]:
    return {"file": result.name, "top_k": scored_documents(result.top_k), "error": result.error or None}


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False)


def _write(text: str) -> None:
    click.echo(text, nl=False)


class _Screen:
    """Each image with its classes, for a person."""

    def __init__(self) -> None:
        self._model = ""
        self._width = 0

    def show(self, answer: "Classification") -> None:
        if not self._model:
            self._model = f"{answer.model.label} ({answer.model.architecture}, {answer.model.dtype})"
            click.echo(self._model)
        # As wide as the widest so far: of many images the last are not waited for.
        names = (len(name_of(each)) for result in answer.results for each in result.top_k)
        self._width = max(self._width, *names, 0)
        for result in answer.results:
            click.echo(f"\n{result.name}")
            _print_classes(result, self._width)

    def end(self) -> None:
        pass


def _print_classes(result: "ImageResult", width: int) -> None:
    if result.error:
        click.echo(f"  {result.error}")
    for scored in result.top_k:
        click.echo(f"  {name_of(scored):<{width}}  {scored.probability:6.1%}  {bar(scored.probability)}".rstrip())
