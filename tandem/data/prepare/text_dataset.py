"""What the two text recipes share: from lines by split to a whole text dataset, without holding the text in memory."""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from tandem.data.manifest import TextDataset
from tandem.data.prepare.staging import Staging
from tandem.data.progress import Progress
from tandem.data.subword import DEFAULT_SIZE
from tandem.data.vocabulary import Tokenizer, Vocabulary, build_subwords, build_vocabulary
from tandem.errors import BadSource

# Progress is told this often; each line would cost more than the work.
_REPORT_LINES = 1000

Lines = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class TextJob:
    """Text found in a source: for each split a function that reads its lines, from the start each time.

    `stamps` is {file: SHA-256}; `place` names the source in errors.
    """

    place: Path
    splits: Mapping[str, Lines]
    stamps: Mapping[str, str]
    tokenizer: Tokenizer
    max_vocabulary: int | None = None

    def identity(self) -> Mapping[str, str]:
        """Return {file name: stamp} of all that goes into the dataset."""
        return self.stamps

    def build(self, staging: Staging, progress: Progress) -> TextDataset:
        """Write text, vocabulary and token ids into the staging directory, and return the manifest.

        What an interruption left is written over: reading the text again takes seconds.
        """
        counts = {
            split: _write_text(staging.path / f"{split}.txt", _counted(lines(), f"reading {split}", progress))
            for split, lines in self.splits.items()
        }

        def prepared(split: str, description: str) -> Iterator[str]:
            return _counted(_read_text(staging.path / f"{split}.txt"), description, progress, counts[split].lines)

        vocabulary = self._vocabulary(lambda: prepared("train", "collecting words"))
        (staging.path / "vocabulary.json").write_bytes(vocabulary.to_json())
        (staging.path / "tokens").mkdir(exist_ok=True)
        num_tokens = {
            split: write_tokens(
                staging.path / "tokens" / f"{split}.npy", prepared(split, f"numbering {split}"), vocabulary
            )
            for split in self.splits
        }
        return TextDataset(
            name=staging.name,
            fingerprint=_fingerprint(staging.path, list(self.splits)),
            source=staging.origin,
            vocabulary_size=len(vocabulary),
            num_tokens=num_tokens,
            tokenizer=self.tokenizer,
            num_words={split: count.words for split, count in counts.items()},
        )

    def _vocabulary(self, train: Lines) -> Vocabulary:
        if self.tokenizer != "subword":
            vocabulary = build_vocabulary(train(), self.tokenizer, self.max_vocabulary)
            if len(vocabulary) >= 4:
                return vocabulary
        elif _has_two_words(train()):
            return build_subwords(train, self.max_vocabulary or DEFAULT_SIZE)
        raise BadSource(f"{self.place} has fewer than 2 different words in its train split")


class _Counts(NamedTuple):
    lines: int
    words: int


def _has_two_words(lines: Iterable[str]) -> bool:
    words = (word for line in lines for word in line.split())
    first = next(words, None)
    return any(word != first for word in words)


def write_tokens(path: Path, lines: Iterable[str], vocabulary: Vocabulary) -> int:
    """Write the token ids of `lines` to `path`, int32 (N,), `<eos>` after each line; return N.

    A word that the vocabulary lacks becomes `<unk>`, which every vocabulary built of words has.
    """
    num_tokens = 0
    with open(path, "wb") as file:
        header_bytes = file.write(_header(0))
        for token_ids in vocabulary.encode_lines(lines):
            file.write(np.array(token_ids, dtype="<i4").tobytes())
            num_tokens += len(token_ids)
        header = _header(num_tokens)
        # numpy pads the header so that the first dimension can grow in place.
        assert len(header) == header_bytes
        file.seek(0)
        file.write(header)
    return num_tokens


def _header(num_tokens: int) -> bytes:
    header = io.BytesIO()
    description = {"descr": "<i4", "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def _write_text(path: Path, lines: Iterable[str]) -> _Counts:
    num_lines = num_words = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(f"{line}\n")
            num_lines += 1
            num_words += len(line.split())
    return _Counts(num_lines, num_words)


def _read_text(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line[:-1]


def _counted(lines: Iterable[str], description: str, progress: Progress, total: int | None = None) -> Iterator[str]:
    progress.start(description, total)
    number = 0
    for number, line in enumerate(lines, 1):
        yield line
        if number % _REPORT_LINES == 0:
            progress.advance(_REPORT_LINES)
    progress.advance(number % _REPORT_LINES)


def _fingerprint(directory: Path, splits: Iterable[str]) -> str:
    """Return a SHA-256 over the vocabulary and the token ids of each split."""
    digest = hashlib.sha256()
    for file in ("vocabulary.json", *(f"tokens/{split}.npy" for split in splits)):
        digest.update(f"{file} {sha256_of(directory / file)}\n".encode())
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of file `path`, hexadecimal."""
    with open(path, "rb") as file:
        return _digest(file)


def _digest(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
