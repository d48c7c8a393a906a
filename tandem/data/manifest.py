"""`dataset.json`: what a prepared dataset holds. Free of torch, so that the command line can read it.

A prepared dataset is one directory `datasets/<name>/`:

    images   dataset.json
             train/<class>/<file>  val/<class>/<file>     regrouped by class, all three-channel
             packed/train.npy  packed/val.npy             optional: uint8 (N, 3, H, W), in index order
             index/train.jsonl index/val.jsonl            {"file": "train/n01/a.JPEG", "label": 0, "bytes": 2048} a line
    text     dataset.json  vocabulary.json
             train.txt valid.txt test.txt                 UTF-8, as prepared
             tokens/train.npy …                           int32 (N,), one <eos> after each line

It appears under its name only when it is whole; `fingerprint` is a SHA-256 over its content. `source.json` beside the
manifest says what it was prepared from (`tandem.data.prepare.staging.Record`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tandem.data.vocabulary import Tokenizer
from tandem.errors import DatasetNotFound
from tandem.volume import Volume

MANIFEST_FILE = "dataset.json"


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassName(_Closed):
    """A class: `id` is its folder (the synset of Tiny-ImageNet), `words` what a person calls it."""

    id: str
    words: str


class ImageDataset(_Closed):
    """A prepared image dataset; `image_size` is (height, width) where all images share one."""

    kind: Literal["images"] = "images"
    format_version: Literal[1] = 1
    name: str
    fingerprint: str
    source: str
    classes: tuple[ClassName, ...] = Field(min_length=1)
    num_images: dict[str, int]
    num_converted: int = 0
    image_size: tuple[int, int] | None = None
    packed: bool = False


class TextDataset(_Closed):
    """A prepared text dataset; `num_tokens` counts `<eos>` too, by split.

    `num_words` counts what blanks part, without `<eos>`. Datasets prepared by older versions lack it and `tokenizer`.
    """

    kind: Literal["text"] = "text"
    format_version: Literal[1] = 1
    name: str
    fingerprint: str
    source: str
    vocabulary_size: int = Field(ge=1)
    num_tokens: dict[str, int]
    tokenizer: Tokenizer | None = None
    num_words: dict[str, int] = Field(default_factory=dict)


Dataset = ImageDataset | TextDataset
_DATASET: TypeAdapter[Dataset] = TypeAdapter(Annotated[Dataset, Field(discriminator="kind")])


def read_dataset(volume: Volume, name: str) -> Dataset:
    """Return the manifest of dataset `name`; raise DatasetNotFound with those that exist."""
    path = volume.dataset(name) / MANIFEST_FILE
    try:
        return _DATASET.validate_json(path.read_bytes())
    except FileNotFoundError:
        known = ", ".join(list_datasets(volume)) or "none yet"
        raise DatasetNotFound(
            f"no dataset {name!r} on the volume (there: {known}); make it with 'tandem data prepare'"
        ) from None
    except ValidationError as error:
        raise DatasetNotFound(f"{path} is no dataset manifest of this version: {error.errors()[0]['msg']}") from error


def list_datasets(volume: Volume) -> list[str]:
    """Return the names of the whole datasets on the volume, sorted."""
    if not volume.datasets.is_dir():
        return []
    return sorted(entry.parent.name for entry in volume.datasets.glob(f"*/{MANIFEST_FILE}") if _named(entry.parent))


def _named(path: Path) -> bool:
    return not path.name.startswith(".")


def read_index(directory: Path, split: str) -> list[tuple[str, int]]:
    """Return [(file relative to `directory`, label)] of an image split, in index order."""
    return [(row["file"], row["label"]) for row in _index_rows(directory, split)]


def read_sizes(directory: Path, split: str) -> list[int] | None:
    """Return the size in bytes of each file of an image split, in index order; None where it was not noted down.

    A file of another size was damaged after it was prepared. Datasets prepared by older versions have no sizes.
    """
    rows = list(_index_rows(directory, split))
    return [row["bytes"] for row in rows] if all("bytes" in row for row in rows) else None


def _index_rows(directory: Path, split: str) -> Iterator[dict[str, Any]]:
    path = directory / "index" / f"{split}.jsonl"
    if not path.is_file():
        raise DatasetNotFound(f"dataset {directory.name!r} has no split {split!r}")
    return (json.loads(line) for line in path.read_text("utf-8").splitlines())


def spread(total: int, limit: int | None) -> list[int]:
    """Return `limit` (None: all) of `total` places at even strides; an index in order of class keeps its shares."""
    if limit is None or limit >= total:
        return list(range(total))
    return [position * total // limit for position in range(limit)]
