"""What the commands that call the inference service share."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import InvalidImage
from tandem.local.state import require_inference_address
from tandem.settings import Settings

if TYPE_CHECKING:
    from tandem.client import Client, Image, ScoredClass
    from tandem.comparison.results import ModelVersion

_BAR_WIDTH = 24


def open_client() -> "Client":
    """Return a client of the server in use; raise ServerUnavailable where none is known. gRPC is imported here."""
    settings = Settings.from_environment()
    address = require_inference_address(settings)
    from tandem.client import Client

    return Client(address, access=settings.client_access)


def read_images(paths: Sequence[Path], label_of: Callable[[Path], str] = lambda _: "") -> Iterator["Image"]:
    """Yield the images of `paths`, read as they are needed; raise InvalidImage at once if one is no readable file."""
    for path in paths:
        _check_readable(path)
    return (_read(path, printable(label_of(path))) for path in paths)


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise InvalidImage(f"{printable(path)} is a folder: name the images in it, such as {printable(path)}/*")
    if not path.is_file():
        raise InvalidImage(f"there is no image {printable(path)}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read(path: Path, label: str) -> "Image":
    from tandem.client import Image

    try:
        return Image(path.read_bytes(), printable(path), label)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InvalidImage:
    return InvalidImage(f"can't read {printable(path)}: {error.strerror}")


def printable(path: Path | str) -> str:
    """Return the name of a file as text that can be printed and sent, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "replace")


def bar(probability: float) -> str:
    """Return `probability`, 0 to 1, as a bar."""
    return "█" * round(probability * _BAR_WIDTH)


def name_of(scored: "ScoredClass") -> str:
    """Return what a person calls the class: its words, with its id where that says something else."""
    return scored.words if scored.words == scored.id or not scored.id else f"{scored.words} ({scored.id})"


def version_document(version: "ModelVersion") -> dict[str, Any]:
    """Return the JSON of who answered."""
    return {
        "name": version.name,
        "version": version.version,
        "run_id": version.run_id,
        "step": version.step,
        "architecture": version.architecture,
        "dtype": version.dtype,
    }


def scored_documents(scored: Sequence["ScoredClass"]) -> list[dict[str, Any]]:
    """Return the JSON of classes with their probabilities, best first."""
    return [
        {"index": each.index, "id": each.id, "words": each.words, "probability": each.probability} for each in scored
    ]
