"""The images of a dataset, written in chunks by several processes; a chunk is done once its note lies in `.work`.

A note holds the SHA-256 of each file and the CRC-32 of the chunk's packed pixels, and a resume checks them: so a chunk
that a power cut left half on the disk is done again, and one that is whole is not.
"""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tandem.data.prepare.images import prepare_image, without_warnings
from tandem.data.prepare.sources import Readable
from tandem.data.progress import Progress
from tandem.errors import BadSource, Unavailable
from tandem.volume import replace_file, volume_errors

CHUNK_IMAGES = 256
# Images up to this side are packed too: at 64×64 a whole epoch is then read faster than one image decodes.
MAX_PACKED_SIDE = 96

_MAX_HEADER_BYTES = 256

Size = tuple[int, int]
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Item(NamedTuple):
    """An image to prepare: its name in the source, its folder and file name in the dataset, its label."""

    entry: str
    folder: str
    file: str
    label: int


class Written(NamedTuple):
    """An image as prepared: its file in the dataset and what that holds."""

    file: str
    sha256: str
    num_bytes: int
    height: int
    width: int
    converted: bool


@dataclass(frozen=True)
class Chunk:
    """Items of one split that follow one another; `first_row` is the index of the first in the split."""

    split: str
    first_row: int
    items: tuple[Item, ...]

    @property
    def note(self) -> str:
        """File name of the note that says this chunk is done."""
        return f"{self.split}-{self.first_row:08d}.json"


Results = Generator[tuple[Chunk, list[Written]], None, None]


@dataclass(frozen=True)
class ImageWriter:
    """Writes chunks below `directory`; `packed_size` is the (height, width) to pack, None for not packing."""

    source: Readable
    directory: Path
    packed_size: Size | None

    def write(self, chunk: Chunk) -> list[Written]:
        """Return what the chunk holds now, having written it unless it was there already."""
        with volume_errors(self.directory):
            note = self.directory / ".work" / chunk.note
            done = self._read_note(note, chunk)
            if done is not None:
                return done
            pixels = self._empty_rows(chunk)
            # One image at a time, as it is read: what is decoded is packed while it is in the cache of the core.
            written = [
                self._write_image(item, None if pixels is None else pixels[row]) for row, item in enumerate(chunk.items)
            ]
            document = {"written": written, "pixels_crc32": self._write_pixels(chunk, pixels, written)}
            # Compact: not for people, and json with an indent takes four times as long.
            replace_file(note, json.dumps(document).encode(), durable=False)
            return written

    def _read_note(self, note: Path, chunk: Chunk) -> list[Written] | None:
        """Return what the note says if it is true of what lies on the volume."""
        try:
            document = json.loads(note.read_bytes())
            written = [Written(*row) for row in document["written"]]
            if any(_sha256((self.directory / row.file).read_bytes()) != row.sha256 for row in written):
                return None
            expected = document["pixels_crc32"]
            return written if expected is None or self._pixels_crc32(chunk) == expected else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _write_image(self, item: Item, row: Pixels | None) -> Written:
        """Write one image, and its pixels into `row` (3, H, W) if it has that size."""
        image = prepare_image(self.source.read(item.entry), item.entry)
        size = image.height_width
        if row is not None and size == self.packed_size:
            row[:] = image.pixels()
        file = f"{item.folder}/{item.file}{image.suffix}"
        self._write_file(f"{self.directory}/{file}", image.data)
        return Written(file, _sha256(image.data), len(image.data), *size, image.converted)

    def _write_file(self, path: str, data: bytes) -> None:
        # Text for a path and no buffer: 14 µs for 2 kB, where Path.write_bytes takes 20, and there are 110,000 files.
        with open(path, "wb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]

    def _empty_rows(self, chunk: Chunk) -> Pixels | None:
        return None if self.packed_size is None else np.empty((len(chunk.items), 3, *self.packed_size), np.uint8)

    def _write_pixels(self, chunk: Chunk, pixels: Pixels | None, written: Sequence[Written]) -> int | None:
        """Put the chunk's pixels where they belong in the packed file and return their CRC-32; None if sizes differ."""
        if pixels is None or any((row.height, row.width) != self.packed_size for row in written):
            return None
        # Written and not mapped: on a full volume a write fails with an error, a mapped page kills the process.
        with open(packed_path(self.directory, chunk.split), "r+b") as file:
            file.seek(self._offset(file.read(_MAX_HEADER_BYTES), chunk))
            file.write(pixels.data)
        return zlib.crc32(pixels.data)

    def _pixels_crc32(self, chunk: Chunk) -> int:
        with open(packed_path(self.directory, chunk.split), "rb") as file:
            file.seek(self._offset(file.read(_MAX_HEADER_BYTES), chunk))
            return zlib.crc32(file.read(len(chunk.items) * self._row_bytes))

    def _offset(self, start: bytes, chunk: Chunk) -> int:
        return start.index(b"\n") + 1 + chunk.first_row * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        height, width = self.packed_size or (0, 0)
        return 3 * height * width


def packed_path(directory: Path, split: str) -> Path:
    """Return where the packed pixels of a split lie: uint8 (N, 3, H, W)."""
    return directory / "packed" / f"{split}.npy"


def create_packed(directory: Path, split: str, num_images: int, size: Size) -> None:
    """Make the packed file of a split, empty, unless one of that size lies there."""
    path = packed_path(directory, split)
    shape = (num_images, 3, *size)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    num_bytes = len(header.getvalue()) + num_images * 3 * size[0] * size[1]
    if path.exists() and path.stat().st_size == num_bytes:
        return
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.write(header.getvalue())
        file.truncate(num_bytes)


def chunks_of(split: str, items: Sequence[Item]) -> list[Chunk]:
    """Cut the items of a split into chunks."""
    return [
        Chunk(split, first, tuple(items[first : first + CHUNK_IMAGES])) for first in range(0, len(items), CHUNK_IMAGES)
    ]


def write_chunks(writer: ImageWriter, chunks: Sequence[Chunk], progress: Progress) -> list[list[Written]]:
    """Write all chunks and return what each holds, in their order.

    More than a few go to a process for each core. Those processes start anew (spawn), so a script that calls this needs
    `if __name__ == "__main__":`. Raises BadSource, VolumeUnavailable; Unavailable if one of the processes was killed.
    """
    progress.start("preparing images", sum(len(chunk.items) for chunk in chunks))
    num_workers = min(len(os.sched_getaffinity(0)), len(chunks), 32)
    written: dict[Chunk, list[Written]] = {}
    alone = len(chunks) <= 2 or num_workers == 1
    # Closed at once when `advance` raises (Ctrl-C): no process goes on writing behind the caller's back.
    with closing(_in_this_process(writer, chunks) if alone else _in_processes(writer, chunks, num_workers)) as results:
        for chunk, rows in results:
            written[chunk] = rows
            progress.advance(len(rows))
    return [written[chunk] for chunk in chunks]


def _in_this_process(writer: ImageWriter, chunks: Sequence[Chunk]) -> Results:
    return ((chunk, writer.write(chunk)) for chunk in chunks)


def _in_processes(writer: ImageWriter, chunks: Sequence[Chunk], num_workers: int) -> Results:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_begin, initargs=(writer,))
    try:
        futures = _submit(pool, chunks)
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise Unavailable(
            "one of the preparing processes was killed (out of memory?); run this again and it goes on from here"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, chunks: Sequence[Chunk]) -> dict[Future[list[Written]], Chunk]:
    # The processes inherit the blocked signal: Ctrl-C at the terminal goes to the whole group, and only the parent
    # should answer it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return {pool.submit(_write, chunk): chunk for chunk in chunks}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_writer: ImageWriter | None = None


def _begin(writer: ImageWriter) -> None:
    """Set up a worker process: what to write with, and an end when its parent is gone."""
    global _writer
    _writer = writer
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A killed parent closes nothing: without this its workers would wait for the next chunk for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(chunk: Chunk) -> list[Written]:
    assert _writer is not None
    return _writer.write(chunk)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def first_size(source: Readable, items: Sequence[Item]) -> Size:
    """Return the (height, width) of the first item."""
    if not items:
        raise BadSource(f"{source.path} holds no images")
    with without_warnings():
        return prepare_image(source.read(items[0].entry), items[0].entry).height_width
