"""What the two image recipes share: from a list of images and labels to a whole image dataset."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.data.manifest import ClassName, ImageDataset
from tandem.data.prepare.image_writer import (
    MAX_PACKED_SIDE,
    ImageWriter,
    Item,
    Size,
    Written,
    chunks_of,
    create_packed,
    first_size,
    write_chunks,
)
from tandem.data.prepare.sources import Readable
from tandem.data.prepare.staging import Staging
from tandem.data.progress import Progress
from tandem.errors import BadSource


@dataclass(frozen=True)
class ImageJob:
    """Images found in a source: the classes in label order, the items of each split in index order.

    `stamps` is {file: stamp} of everything that was read, with names relative to the dataset's top in the source.
    """

    source: Readable
    classes: tuple[ClassName, ...]
    splits: Mapping[str, Sequence[Item]]
    stamps: Mapping[str, str]

    def identity(self) -> Mapping[str, str]:
        """Return {file name: stamp} of all that goes into the dataset."""
        return self.stamps

    def build(self, staging: Staging, progress: Progress) -> ImageDataset:
        """Write images, index and packed pixels into the staging directory, and return the manifest."""
        size = first_size(self.source, self.splits["train"])
        packed_size = size if max(size) <= MAX_PACKED_SIDE else None
        self._make_folders(staging.path, packed_size)
        written = self._write_images(staging.path, packed_size, progress)
        # Publishing waits for the disk: let it begin while the index is written and the fingerprint taken.
        threading.Thread(target=os.sync, daemon=True).start()
        rows = [row for split in written.values() for row in split]
        uniform = all((row.height, row.width) == size for row in rows)
        if not uniform:
            shutil.rmtree(staging.path / "packed", ignore_errors=True)
        for split, items in self.splits.items():
            _write_index(staging.path, split, items, written[split])
        return ImageDataset(
            name=staging.name,
            fingerprint=self._fingerprint(written),
            source=staging.origin,
            classes=self.classes,
            num_images={split: len(items) for split, items in self.splits.items()},
            num_converted=sum(row.converted for row in rows),
            image_size=size if uniform else None,
            packed=uniform and packed_size is not None,
        )

    def _make_folders(self, directory: Path, packed_size: Size | None) -> None:
        (directory / "index").mkdir(exist_ok=True)
        for split, items in self.splits.items():
            for folder in {item.folder for item in items}:
                (directory / folder).mkdir(parents=True, exist_ok=True)
            if packed_size:
                create_packed(directory, split, len(items), packed_size)

    def _write_images(self, directory: Path, packed_size: Size | None, progress: Progress) -> dict[str, list[Written]]:
        writer = ImageWriter(self.source, directory, packed_size)
        chunks = [chunk for split, items in self.splits.items() for chunk in chunks_of(split, items)]
        written: dict[str, list[Written]] = {split: [] for split in self.splits}
        for chunk, rows in zip(chunks, write_chunks(writer, chunks, progress), strict=True):
            written[chunk.split] += rows
        return written

    def _fingerprint(self, written: Mapping[str, Sequence[Written]]) -> str:
        """Return a SHA-256 over classes, file names and file contents, in label and index order."""
        digest = hashlib.sha256(json.dumps([[entry.id, entry.words] for entry in self.classes]).encode())
        for split, rows in written.items():
            digest.update(json.dumps([split, [[row.file, row.sha256] for row in rows]]).encode())
        return digest.hexdigest()


def check_splits(source: Readable, splits: Mapping[str, Sequence[Item]], num_classes: int) -> None:
    """Raise BadSource unless there are two classes or more, and images in every split with names of their own."""
    if num_classes < 2:
        found = "1 class folder" if num_classes == 1 else f"{num_classes} class folders"
        raise BadSource(f"{source.path} holds {found} with images; a classifier needs at least 2, each with images")
    for split, items in splits.items():
        if not items:
            raise BadSource(f"{source.path} gives no images for the {split} split; add some")
        names = {f"{item.folder}/{item.file}" for item in items}
        for item in items:
            # A converted a.gif is written as a.gif.png, which must not be there already.
            if f"{item.folder}/{item.file}.png" in names:
                raise BadSource(
                    f"{item.entry} and {item.file}.png in {source.path} would get the same name; rename one"
                )
        if len(names) < len(items):
            raise BadSource(f"{source.path} holds two images of a class with one name in the {split} split; rename one")


def _write_index(directory: Path, split: str, items: Sequence[Item], written: Sequence[Written]) -> None:
    # Non-ASCII is escaped, so that no character in a name is taken for the end of a line.
    lines = (
        json.dumps({"file": row.file, "label": item.label, "bytes": row.num_bytes})
        for item, row in zip(items, written, strict=True)
    )
    (directory / "index" / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
