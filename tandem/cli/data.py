"""`tandem data`: prepare datasets and list them. What is heavy (numpy, PIL, pydantic) is imported when it is used."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from tandem.cli.output import console, json_option, open_volume, print_json, table
from tandem.cli.progress import BarProgress

if TYPE_CHECKING:
    from tandem.data.manifest import Dataset, ImageDataset, TextDataset
    from tandem.data.progress import Progress
    from tandem.data.vocabulary import Tokenizer
    from tandem.volume import Volume

Prepare = Callable[["Volume", "Progress"], "Dataset"]


@click.group()
def data() -> None:
    """Prepare datasets and list them."""


@data.group()
def prepare() -> None:
    """Make a dataset out of a zip, a folder or an address; the source is never altered.

    It appears under its name only when it is whole. An interrupted preparation goes on when it is called again, and
    one that is done already is recognized.
    """


def _source_option(default: str = "", metavar: str = "PATH|URL") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if default:
        return click.option("--source", metavar=metavar, default=default, help=f"Default: {default}.")
    return click.option("--source", metavar=metavar, required=True, help="Where the data is.")


_force_option = click.option("--force", is_flag=True, help="Replace a dataset of that name, once the new one is whole.")
_name_option = click.option("--name", required=True, help="What to call the dataset.")


# The defaults stand here too, so that --help imports no recipe; a test holds them equal to those of the recipes.
@prepare.command("tiny-imagenet")
@_source_option("http://cs231n.stanford.edu/tiny-imagenet-200.zip")
@click.option("--name", default="tiny-imagenet", show_default=True, help="What to call the dataset.")
@click.option("--no-checksum", is_flag=True, help="Take a zip whose MD5 is not that of the official one.")
@click.option("--allow-missing", is_flag=True, help="Take a source that lacks classes, or val images.")
@_force_option
@json_option
def tiny_imagenet(source: str, name: str, no_checksum: bool, allow_missing: bool, force: bool, as_json: bool) -> None:
    """Tiny-ImageNet (200 classes, 64×64) from the official zip, the folder it unpacks to, or an address."""

    def run(volume: "Volume", progress: "Progress") -> "Dataset":
        from tandem.data.prepare import prepare_tiny_imagenet

        checks = {"checksum": not no_checksum, "allow_missing": allow_missing}
        return prepare_tiny_imagenet(volume, source, name, **checks, force=force, progress=progress)

    _prepare(name, run, as_json)


@prepare.command("wikitext-2")
@_source_option("https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip")
@click.option("--name", default="wikitext-2", show_default=True, help="What to call the dataset.")
@_force_option
@json_option
def wikitext(source: str, name: str, force: bool, as_json: bool) -> None:
    """WikiText-2 from its zip, a tar file, the folder it unpacks to, or an address."""

    def run(volume: "Volume", progress: "Progress") -> "Dataset":
        from tandem.data.prepare import prepare_wikitext

        return prepare_wikitext(volume, source, name, force=force, progress=progress)

    _prepare(name, run, as_json)


@prepare.command("image-folder")
@_source_option(metavar="DIR|ZIP|URL")
@_name_option
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Part of each class to hold out, where the source has no val folder.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the images that are held out.")
@_force_option
@json_option
def image_folder(source: str, name: str, val_fraction: float, seed: int, force: bool, as_json: bool) -> None:
    """Your own pictures: one folder for each class, or train/ and val/ with those in them."""

    def run(volume: "Volume", progress: "Progress") -> "Dataset":
        from tandem.data.prepare import prepare_image_folder

        return prepare_image_folder(
            volume, source, name, val_fraction=val_fraction, seed=seed, force=force, progress=progress
        )

    _prepare(name, run, as_json)


@prepare.command("text")
@_source_option(metavar="FILE|DIR|URL")
@_name_option
@click.option(
    "--tokenizer",
    type=click.Choice(["words", "whitespace", "subword"]),
    default="words",
    show_default=True,
    help="words parts punctuation from words; whitespace is for text that is tokenized already; subword learns parts "
    "of words (byte-level BPE), so that no word is unknown.",
)
@click.option(
    "--max-vocabulary",
    type=click.IntRange(min=4),
    help="Keep the most frequent words; the rest become <unk>. Of subwords, how many are learned.  "
    "[default: all words, 8000 subwords]",
)
@_force_option
@json_option
def text(source: str, name: str, tokenizer: str, max_vocabulary: int | None, force: bool, as_json: bool) -> None:
    """Your own text: one UTF-8 file, or a folder with train.txt, valid.txt and maybe test.txt."""

    def run(volume: "Volume", progress: "Progress") -> "Dataset":
        from tandem.data.prepare import prepare_text

        return prepare_text(
            volume,
            source,
            name,
            tokenizer=cast("Tokenizer", tokenizer),
            max_vocabulary=max_vocabulary,
            force=force,
            progress=progress,
        )

    _prepare(name, run, as_json)


@prepare.command("dummy")
@click.option("--name", default="dummy", show_default=True, help="What to call the dataset.")
@click.option("--classes", type=click.IntRange(min=2), default=10, show_default=True, help="How many classes.")
@click.option("--images", type=click.IntRange(min=2), default=1000, show_default=True, help="Of the train split.")
@click.option("--val-images", type=click.IntRange(min=1), default=200, show_default=True, help="Of the val split.")
@click.option(
    "--image-size", type=click.IntRange(8, 1024), default=64, show_default=True, help="Side of each image in pixels."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the pixels.")
@_force_option
@json_option
def dummy(
    name: str, classes: int, images: int, val_images: int, image_size: int, seed: int, force: bool, as_json: bool
) -> None:
    """Random pixels, to try and time training without data.

    An eighth of each image is a colour that all images of its class share, so that a loss can fall; the rest is noise.
    """

    def run(volume: "Volume", progress: "Progress") -> "Dataset":
        from tandem.data.prepare import prepare_dummy

        counts = {"num_classes": classes, "num_images": images, "num_val_images": val_images}
        return prepare_dummy(volume, name, **counts, image_size=image_size, seed=seed, force=force, progress=progress)

    _prepare(name, run, as_json)


def _prepare(name: str, run: Prepare, as_json: bool) -> None:
    """Run a preparation under a progress bar and print what came of it."""
    volume = open_volume()
    path = volume.dataset(name)
    before, began = _inode(path), time.monotonic()
    try:
        with BarProgress() as progress:
            dataset = run(volume, progress)
    except KeyboardInterrupt:
        click.echo("tandem: interrupted; the same command goes on from here", err=True)
        raise
    # A preparation publishes a new directory; the same one means that there was nothing to do.
    already = before is not None and _inode(path) == before
    if as_json:
        facts = {"path": str(path), "already_prepared": already, "seconds": round(time.monotonic() - began, 3)}
        print_json(dataset.model_dump(mode="json") | facts)
    else:
        _print_outcome(dataset, path, already, time.monotonic() - began)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _print_outcome(dataset: "Dataset", path: Path, already: bool, seconds: float) -> None:
    how = "is already prepared" if already else f"is prepared ({seconds:.1f} s)"
    lines = [f"{dataset.name} {how}: {path}"]
    if dataset.kind == "images":
        lines += [f"  {_classes(dataset)}", f"  {_counts(dataset.num_images, 'images')}", f"  {_converted(dataset)}"]
        command = "classifier"
    else:
        lines += [f"  vocabulary of {dataset.vocabulary_size:,} tokens{_tokenizer(dataset)}"]
        lines += [f"  {_counts(dataset.num_tokens, 'tokens')}"]
        lines += [f"  {_counts(dataset.num_words, 'words, parted by blanks')}"] if dataset.num_words else []
        command = "lm"
    click.echo("\n".join([*lines, f"Train on it: tandem train {command} --data {dataset.name}"]))


def _tokenizer(dataset: "TextDataset") -> str:
    return f" ({dataset.tokenizer})" if dataset.tokenizer else ""


def _classes(dataset: "ImageDataset") -> str:
    size = f"{dataset.image_size[1]}×{dataset.image_size[0]} pixels" if dataset.image_size else "of various sizes"
    words = ", ".join(entry.words.partition(",")[0] for entry in dataset.classes[:3])
    more = ", …" if len(dataset.classes) > 3 else ""
    return f"{len(dataset.classes)} classes ({words}{more}), {size}{', packed' if dataset.packed else ''}"


def _counts(by_split: dict[str, int], what: str) -> str:
    return " · ".join(f"{split} {count:,}" for split, count in by_split.items()) + f" {what}"


def _converted(dataset: "ImageDataset") -> str:
    return f"{dataset.num_converted:,} converted to three channels of 8 bits"


@data.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the datasets on the volume."""
    from tandem.data.manifest import list_datasets, read_dataset
    from tandem.errors import DatasetNotFound

    volume = open_volume()
    datasets = []
    for name in list_datasets(volume):
        try:
            datasets.append(read_dataset(volume, name))
        except DatasetNotFound as error:
            click.echo(f"tandem: left out: {error}", err=True)
    if as_json:
        print_json([entry.model_dump(mode="json") | {"path": str(volume.dataset(entry.name))} for entry in datasets])
    elif datasets:
        _print_table(datasets)
    else:
        click.echo(f"no datasets in {volume.datasets}; make one with 'tandem data prepare'")


def _print_table(datasets: list["ImageDataset | TextDataset"]) -> None:
    rows = table("name", "kind", "holds", "splits")
    for entry in datasets:
        if entry.kind == "images":
            rows.add_row(entry.name, "images", f"{len(entry.classes)} classes", _counts(entry.num_images, "images"))
        else:
            holds = f"vocabulary of {entry.vocabulary_size:,}{_tokenizer(entry)}"
            rows.add_row(entry.name, "text", holds, _counts(entry.num_tokens, "tokens"))
    console().print(rows)
