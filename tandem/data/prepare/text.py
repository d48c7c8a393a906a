"""A person's own text: one UTF-8 file, or a folder with `train.txt`, `valid.txt` (or `val.txt`), maybe `test.txt`.

One file is cut by lines, in order: the first 90 % train, then 5 % valid, then 5 % test. Blank lines are left out, as
they only part paragraphs. Tokens are words and punctuation marks (`words`), what blanks part (`whitespace`), or parts
of words that are learned from the train split (`subword`).
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tandem.data.manifest import TextDataset
from tandem.data.prepare.lines import read_lines
from tandem.data.prepare.sources import Source, TreeSource
from tandem.data.prepare.staging import Preparation
from tandem.data.prepare.text_dataset import Lines, TextJob
from tandem.data.progress import Progress, Silent
from tandem.data.subword import DEFAULT_SIZE, MIN_SIZE
from tandem.data.vocabulary import Tokenizer
from tandem.errors import BadSource, InvalidRequest
from tandem.volume import Volume

MIN_VOCABULARY = 4


def prepare_text(
    volume: Volume,
    source: str | Path,
    name: str,
    *,
    tokenizer: Tokenizer = "words",
    max_vocabulary: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> TextDataset:
    """Prepare a text file, its address, or a folder of splits, as dataset `name`; return the manifest.

    The vocabulary is that of the train split, at most `max_vocabulary` tokens with `<unk>` and `<eos>`; of subwords
    8000 by default. Raises InvalidRequest for a smaller vocabulary than there can be, and what `Preparation.run` does.
    """
    smallest = MIN_SIZE if tokenizer == "subword" else MIN_VOCABULARY
    if max_vocabulary is not None and max_vocabulary < smallest:
        why = " (<eos>, the 256 bytes and a pair of them)" if tokenizer == "subword" else ""
        raise InvalidRequest(f"--max-vocabulary: {max_vocabulary} is under {smallest}{why}", field="max_vocabulary")
    if tokenizer == "subword":
        max_vocabulary = max_vocabulary or DEFAULT_SIZE
    recipe = Text(tokenizer, max_vocabulary)
    return Preparation(volume, name, str(source), recipe, TextDataset, force, progress or Silent()).run()


@dataclass(frozen=True)
class Text:
    """The recipe; see `prepare_text`."""

    tokenizer: Tokenizer = "words"
    max_vocabulary: int | None = None
    name: str = "text"

    @property
    def options(self) -> Mapping[str, str | int | None]:
        """What changes the outcome."""
        return {"tokenizer": self.tokenizer, "max_vocabulary": self.max_vocabulary}

    def open(self, path: Path, progress: Progress) -> TextJob:
        """Look through the source at `path`; raise BadSource if there is no text in it."""
        progress.start("looking through the source", None)
        if path.is_dir():
            splits, stamps = _open_folder(TreeSource(path))
        elif path.is_file():
            splits, stamps = _open_file(TreeSource(path.parent), path.name)
        else:
            raise BadSource(f"there is no file or folder {path}")
        return TextJob(path, splits, stamps, self.tokenizer, self.max_vocabulary)


def _open_file(source: TreeSource, name: str) -> tuple[dict[str, Lines], dict[str, str]]:
    num_lines = sum(1 for _ in _filled_lines(source, name))
    if num_lines < 3:
        raise BadSource(
            f"{source.path / name} has {num_lines} lines with text; it takes 3 or more to be split: "
            "put each sentence or paragraph on a line"
        )
    num_valid = max(1, num_lines // 20)
    num_train = num_lines - 2 * num_valid
    bounds = {
        "train": (0, num_train),
        "valid": (num_train, num_train + num_valid),
        "test": (num_train + num_valid, None),
    }

    def part(start: int, stop: int | None) -> Lines:
        return lambda: islice(_filled_lines(source, name), start, stop)

    return {split: part(*bound) for split, bound in bounds.items()}, {"text": digest(source, name)}


def _open_folder(source: TreeSource) -> tuple[dict[str, Lines], dict[str, str]]:
    valid = "val.txt" if source.has("val.txt") and not source.has("valid.txt") else "valid.txt"
    files = {"train": "train.txt", "valid": valid, "test": "test.txt"}
    if not source.has("test.txt"):
        del files["test"]
    for name in files.values():
        if not source.has(name):
            raise BadSource(
                f"{source.path} has no {name}; a folder needs train.txt and valid.txt, and may have test.txt"
            )
        if next(_filled_lines(source, name), None) is None:
            raise BadSource(f"{source.path / name} has no text in it")

    def whole(name: str) -> Lines:
        return lambda: _filled_lines(source, name)

    return {split: whole(name) for split, name in files.items()}, {
        split: digest(source, name) for split, name in files.items()
    }


def _filled_lines(source: Source, name: str) -> Iterator[str]:
    return (line for line in read_lines(source, name) if line.strip())


def digest(source: Source, name: str) -> str:
    """Return the SHA-256 of file `name` of a source, hexadecimal."""
    result = hashlib.sha256()
    for block in source.blocks(name):
        result.update(block)
    return result.hexdigest()
