"""`tandem compare --report`: the page, and where its images come from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tandem.cli.calls import printable
from tandem.cli.output import write_output
from tandem.errors import InvalidImage, TandemError

if TYPE_CHECKING:
    from tandem.comparison.results import Comparison

ReadImage = Callable[[str], bytes | None]


def predicted_dataset(predictions: Path) -> str:
    """Return the dataset that a predictions file is of."""
    from tandem.comparison.predictions import read_predictions

    header, _ = read_predictions(predictions)
    return header.dataset


def num_page_images() -> int:
    """Return how many images a page shows at the most; jinja2 is imported here."""
    from tandem.comparison.report import MAX_IMAGES

    return MAX_IMAGES


def file_images(paths: Sequence[Path]) -> ReadImage:
    """Return what reads those of the files `paths` that are asked for, by the names under which they were sent."""
    of_names = {printable(path): path for path in paths}
    return lambda name: _read(of_names.get(name))


def volume_images(dataset: str) -> ReadImage:
    """Return what reads the images of a dataset by their names, as far as they are on this machine's volume."""
    from tandem.cli.output import open_volume

    try:
        folder = open_volume().dataset(dataset).resolve()
    except TandemError:
        return lambda _: None

    def read(name: str) -> bytes | None:
        path = (folder / name).resolve()
        # The name came from a server or a file.
        return _read(path) if path.is_relative_to(folder) else None

    return read


def _read(path: Path | None) -> bytes | None:
    from tandem.data.encoded import small

    try:
        return None if path is None else small(path.read_bytes())
    except (OSError, InvalidImage):
        return None


def write_page(path: Path, answer: "Comparison", read_image: ReadImage) -> None:
    """Write the report of `answer`, whole or not at all; raise InvalidRequest where it can't be written."""
    from tandem.comparison.report import write_report

    summary = answer.summary
    page = write_report(answer, f"{summary.a.label} and {summary.b.label} compared", read_image)
    write_output(path, page)
    click.echo(f"report written to {path}", err=True)
