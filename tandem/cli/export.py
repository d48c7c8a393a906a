"""`tandem models export`: a model as a file that other programs run."""

import contextlib
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.checkpoints.card import parse_card
from tandem.checkpoints.files import MODEL_FILE, read_verified
from tandem.checkpoints.registry import Located
from tandem.cli.output import console, json_option, open_registry, open_volume, print_json
from tandem.errors import InvalidRequest
from tandem.export.request import SUFFIXES, ExportRequest, FormatName, LanguageExportReport, check_output
from tandem.export.sources import dataset_images, given_images
from tandem.volume import Volume

if TYPE_CHECKING:
    from tandem.export.process import Report


@click.command()
@click.argument("reference", metavar="REF")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(SUFFIXES)),
    default="onnx",
    show_default=True,
    help="Kind of file.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="The file  [default: NAME-VERSION.onnx or .pt2 in this directory]"
)
@click.option("--data", metavar="DATASET", help="Check on images of its val split  [default: what REF was trained on]")
@click.option(
    "--images-from",
    metavar="PATH",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Check on this image file, or those of this folder, instead; may be given again.",
)
@click.option(
    "--images", type=click.IntRange(1, 10_000), default=32, show_default=True, help="Images to check on, at most."
)
@click.option(
    "--batch-size",
    type=click.IntRange(2, 1024),
    default=16,
    show_default=True,
    help="Images at once in the check, beside one by one.",
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@json_option
def export(
    reference: str,
    format_name: FormatName,
    output: Path | None,
    data: str | None,
    images_from: tuple[Path, ...],
    images: int,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    """Write REF as an ONNX file or a torch.export program, checked against the network.

    A classifier is checked on real images. The file takes normalised images, float32 (B, 3, S, S), and gives logits
    (B, classes), for any B. It holds the classes, the preprocessing and where the model comes from.

    A language model is checked on random tokens, whole and token by token. The file takes token_ids, int64 (B, T), and
    the state, zeros at first; it gives logits (B, T, words) and the state to hand on, named …_after. It holds the
    vocabulary. B and T are open; only T of recurrent networks is 1 in a torch.export program.

    The check runs the very file that is then put in place;
    if it fails, nothing is written. --json prints {model, format, file, file_bytes, opset, num_images, batch_sizes,
    max_difference, relative_difference, tolerance, num_ties}; of a language model {…, dynamic, num_tokens, pieces, …}
    for num_images.
    """
    if data and images_from:
        raise click.UsageError("--data and --images-from exclude each other")
    volume = open_volume()
    located = open_registry().resolve(reference)
    target = _target(located, format_name, output)
    check_output(target, force)
    request = ExportRequest(
        checkpoint=located.checkpoint,
        digest=located.digest,
        label=located.label,
        format=format_name,
        output=target,
        images=_images(volume, located, data, images_from, images),
        batch_size=batch_size,
        force=force,
    )
    _print(_run(request), as_json)


def _target(located: Located, format_name: FormatName, output: Path | None) -> Path:
    suffix = SUFFIXES[format_name]
    if output is None:
        return Path.cwd() / (located.label.removeprefix("run:").replace("/", "-step-").replace(":", "-") + suffix)
    others = {each: name for name, each in SUFFIXES.items() if name != format_name}
    if output.suffix in others:
        raise click.UsageError(f"--output {output} is named as for --format {others[output.suffix]}")
    return output.absolute()


def _images(
    volume: Volume, located: Located, data: str | None, images_from: tuple[Path, ...], num_images: int
) -> tuple[Path, ...]:
    """Return the images to check on; none for a language model."""
    card = parse_card(read_verified(located.checkpoint, (MODEL_FILE,), located.digest)[MODEL_FILE])
    if card.kind != "classifier":
        context = click.get_current_context()
        for option in ("data", "images_from", "images", "batch_size"):
            if context.get_parameter_source(option) is not click.core.ParameterSource.DEFAULT:
                flag = f"--{option.replace('_', '-')}"
                raise InvalidRequest(
                    f"{located.label} is a language model, which is checked on tokens: leave out {flag}"
                )
        return ()
    if images_from:
        return given_images(images_from, num_images)
    return dataset_images(volume, data or card.dataset, num_images)


def _run(request: ExportRequest) -> "Report":
    from tandem.export.process import run_export

    with _working(request):
        return run_export(request)


def _working(request: ExportRequest) -> AbstractContextManager[Any]:
    """Show a person that it goes on: an export takes seconds, of a large network a minute."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    on = f"{len(request.images)} images" if request.images else "random tokens"
    return console(stderr=True).status(f"exporting {request.label} and checking it on {on} …")


def _print(report: "Report", as_json: bool) -> None:
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    opset = f", opset {report.opset}" if report.opset else ""
    ties = f" ({report.num_ties} tied)" if report.num_ties else ""
    click.echo(f"{report.file}  ({report.format}{opset}, {report.file_bytes / 1e6:.1f} MB)")
    click.echo(f"  checked against {report.model} on {_checked_on(report)}")
    click.echo(
        f"  largest difference of a logit {report.max_difference:.2g}, {report.relative_difference:.1e} of their scale "
        f"(allowed {report.tolerance:.0e}); same best {_unit(report)} for all{ties}"
    )


def _checked_on(report: "Report") -> str:
    sizes = f"at batch sizes {' and '.join(map(str, report.batch_sizes))}"
    if isinstance(report, LanguageExportReport):
        *others, last = map(str, report.pieces)
        at_once = f"{', '.join(others)} and {last}" if others else last
        return f"{report.num_tokens} random tokens, {at_once} at a time, {sizes}; open: {', '.join(report.dynamic)}"
    images = "1 image" if report.num_images == 1 else f"{report.num_images} images"
    return f"{images}, {sizes}"


def _unit(report: "Report") -> str:
    return "word" if isinstance(report, LanguageExportReport) else "class"
