"""What the commands that call the inference service share."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import InvalidImage
from tandem.local.state import require_inference_address
from tandem.settings import Settings

if TYPE_CHECKING:
    from tandem.client import Client, Image, ScoredClass
    from tandem.wire.results import ModelVersion

_BAR_WIDTH = 24


def open_client() -> "Client":
    """Return a client of the server in use; raise ServerUnavailable where none is known. gRPC is imported here."""
    address = require_inference_address(Settings.from_environment())
    from tandem.client import Client

    return Client(address)


def read_images(paths: Sequence[Path], label_of: Callable[[Path], str] = lambda _: "") -> Iterator["Image"]:
    """Yield the images of `paths`, read as they are needed; raise InvalidImage at once if one is no file."""
    for path in paths:
        if path.is_dir():
            raise InvalidImage(f"{path} is a folder: name the images in it, such as {path}/*")
        if not path.is_file():
            raise InvalidImage(f"there is no image {path}")
    return (_read(path, label_of(path)) for path in paths)


def _read(path: Path, label: str) -> "Image":
    from tandem.client import Image

    try:
        return Image(path.read_bytes(), str(path), label)
    except OSError as error:
        raise InvalidImage(f"can't read {path}: {error.strerror}") from error


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
