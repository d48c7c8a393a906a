"""WikiText-2, or any text in its form: tokenized already, `<unk>` in place of rare words.

The source holds `train.txt`, `valid.txt` and `test.txt`, or `wiki.train.tokens` and so on, at its top or in one folder
below it. Every line ends in `<eos>`, the blank ones too: that is how the published perplexities count.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.data.manifest import TextDataset
from tandem.data.prepare.archives import open_source
from tandem.data.prepare.lines import read_lines
from tandem.data.prepare.sources import Source
from tandem.data.prepare.staging import Preparation
from tandem.data.prepare.text import digest
from tandem.data.prepare.text_dataset import Lines, TextJob
from tandem.data.progress import Progress, Silent
from tandem.errors import BadSource
from tandem.volume import Volume

DEFAULT_NAME = "wikitext-2"
# No checksum of this file was ever published, so that what comes is checked by its form alone (and a zip's own CRCs).
DEFAULT_URL = "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip"

_SPLITS = ("train", "valid", "test")
_FORMS = ("{}.txt", "wiki.{}.tokens")


def prepare_wikitext(
    volume: Volume,
    source: str | Path = DEFAULT_URL,
    name: str = DEFAULT_NAME,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> TextDataset:
    """Prepare WikiText-2 from a folder, a zip, a tar file or an address; return the manifest.

    Raises what `Preparation.run` does.
    """
    return Preparation(volume, name, str(source), WikiText(), TextDataset, force, progress or Silent()).run()


@dataclass(frozen=True)
class WikiText:
    """The recipe; see `prepare_wikitext`."""

    name: str = "wikitext-2"

    @property
    def options(self) -> Mapping[str, str]:
        """What changes the outcome: nothing."""
        return {}

    def open(self, path: Path, progress: Progress) -> TextJob:
        """Look through the source at `path`; raise BadSource if it has not the three files."""
        progress.start("looking through the source", None)
        source = open_source(path)
        files = _find_files(source)
        for name in files.values():
            if not any(line.strip() for line in read_lines(source, name)):
                raise BadSource(f"{source.path / name} has no text in it")
        stamps = {split: digest(source, name) for split, name in files.items()}
        return TextJob(path, {split: _lines(source, name) for split, name in files.items()}, stamps, "whitespace")


def _find_files(source: Source) -> dict[str, str]:
    """Return {split: file name} in a source; raise BadSource where no folder has all three."""
    for top in ("", *(f"{folder}/" for folder in source.folders(""))):
        for form in _FORMS:
            files = {split: top + form.format(split) for split in _SPLITS}
            if all(source.has(name) for name in files.values()):
                return files
    raise BadSource(
        f"{source.path} is no WikiText: it has no train.txt, valid.txt and test.txt (or wiki.train.tokens …), "
        "nor has a folder in it"
    )


def _lines(source: Source, name: str) -> Lines:
    def read() -> Iterator[str]:
        return read_lines(source, name)

    return read
