"""Tiny-ImageNet: 200 classes of 64×64 pictures, from the official zip or the folder it unpacks to.

The source has `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG` with `val/val_annotations.txt`, `wnids.txt` and
`words.txt`; its `test/` has no labels and is left out. Labels are the places of the sorted wnids, as torchvision's
ImageFolder numbers them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.data.manifest import ClassName, ImageDataset
from tandem.data.prepare.archives import open_random_access
from tandem.data.prepare.image_dataset import ImageJob, check_splits
from tandem.data.prepare.image_writer import Item
from tandem.data.prepare.images import is_image_name
from tandem.data.prepare.sources import Source, TreeSource, check_component, check_md5
from tandem.data.prepare.staging import Preparation
from tandem.data.progress import Progress, Silent
from tandem.errors import BadSource
from tandem.volume import Volume

DEFAULT_NAME = "tiny-imagenet"
DEFAULT_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ZIP_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

_TOP = "tiny-imagenet-200/"
_ANNOTATIONS = "val/val_annotations.txt"


def prepare_tiny_imagenet(
    volume: Volume,
    source: str | Path = DEFAULT_URL,
    name: str = DEFAULT_NAME,
    *,
    checksum: bool = True,
    allow_missing: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ImageDataset:
    """Prepare Tiny-ImageNet from a zip, an unpacked folder (or its parent), or an address; return the manifest.

    `checksum` compares a zip's MD5 with that of the official one; `allow_missing` takes a source that lacks classes of
    wnids.txt or annotated val images. Raises what `Preparation.run` does.
    """
    recipe = TinyImageNet(checksum, allow_missing)
    return Preparation(volume, name, str(source), recipe, ImageDataset, force, progress or Silent()).run()


@dataclass(frozen=True)
class TinyImageNet:
    """The recipe; see `prepare_tiny_imagenet`."""

    checksum: bool = True
    allow_missing: bool = False
    name: str = "tiny-imagenet"

    @property
    def options(self) -> Mapping[str, bool]:
        """What changes the outcome."""
        return {"allow_missing": self.allow_missing}

    def open(self, path: Path, progress: Progress) -> ImageJob:
        """Look through the source at `path`; raise BadSource if it is not Tiny-ImageNet, altered or incomplete."""
        source = open_random_access(path)
        top = _find_top(source)
        if self.checksum and not isinstance(source, TreeSource):
            progress.start(f"checking {path.name}", None)
            check_md5(path, ZIP_MD5)
        progress.start("looking through the source", None)
        return _Layout(source, top, self.allow_missing).job()


def _find_top(source: Source) -> str:
    for top in ("", _TOP):
        if "train" in source.folders(top):
            return top
    raise BadSource(f"{source.path} is no Tiny-ImageNet: it has no folder train, nor {_TOP}train")


@dataclass(frozen=True)
class _Layout:
    """The files of a source below `top`, put in order."""

    source: Source
    top: str
    allow_missing: bool

    def job(self) -> ImageJob:
        """Return what to prepare."""
        wnids = self._wnids()
        annotations = self._annotations()
        train, val = self.source.files(f"{self.top}train"), self.source.files(f"{self.top}val/images")
        images = self._train_images(train)
        labels = {wnid: label for label, wnid in enumerate(self._train_classes(wnids, set(images.values())))}
        splits = {"train": self._train_items(images, labels), "val": self._val_items(val, annotations, wnids, labels)}
        check_splits(self.source, splits, len(labels))
        words = self._words()
        classes = tuple(ClassName(id=wnid, words=words.get(wnid, wnid)) for wnid in labels)
        stamps = {name.removeprefix(self.top): stamp for name, stamp in (train | val).items()}
        # The lists' content goes into the identity through what they decide.
        stamps |= {f"val/{file}": wnid for file, wnid in annotations.items()}
        stamps |= {f"words/{entry.id}": entry.words for entry in classes}
        return ImageJob(self.source, classes, splits, stamps)

    def _wnids(self) -> set[str]:
        wnids = self.source.text(f"{self.top}wnids.txt").split()
        return {check_component(wnid, self.source) for wnid in wnids}

    def _words(self) -> dict[str, str]:
        lines = self.source.text(f"{self.top}words.txt").splitlines()
        return {wnid: words.strip() for wnid, _, words in (line.partition("\t") for line in lines) if words.strip()}

    def _annotations(self) -> dict[str, str]:
        """Return {val file name: wnid}."""
        found: dict[str, str] = {}
        for number, line in enumerate(self.source.text(f"{self.top}{_ANNOTATIONS}").splitlines(), 1):
            if not line.strip():
                continue
            fields = line.split("\t")
            if len(fields) < 2 or found.get(fields[0], fields[1]) != fields[1]:
                raise self._bad(f"line {number} of {_ANNOTATIONS} is not '<file> TAB <wnid> …', or contradicts another")
            found[fields[0]] = fields[1]
        return found

    def _train_images(self, train: Iterable[str]) -> dict[str, str]:
        """Return {image in the source: its wnid}."""
        start = len(self.top)
        parts = {name: name[start:].split("/") for name in train if is_image_name(name)}
        return {name: path[1] for name, path in parts.items() if len(path) == 4 and path[2] == "images"}

    def _train_classes(self, wnids: set[str], filled: set[str]) -> list[str]:
        """Return the wnids with train images, sorted; raise BadSource for an empty, unknown or missing one."""
        if empty := sorted(set(self.source.folders(f"{self.top}train")) - filled):
            raise self._bad(
                f"class folder train/{empty[0]} has no images; add some, or remove it and its line of wnids.txt"
            )
        if unknown := sorted(filled - wnids):
            raise self._bad(f"class folder train/{unknown[0]} is not in wnids.txt")
        self._check_missing(sorted(wnids - filled), f"of the {len(wnids)} classes in wnids.txt have no train images")
        return sorted(filled)

    def _train_items(self, images: Mapping[str, str], labels: Mapping[str, int]) -> list[Item]:
        items = [self._item(name, "train", wnid, labels) for name, wnid in images.items()]
        return sorted(items, key=lambda item: (item.label, item.file))

    def _val_items(
        self, val: Mapping[str, str], annotations: Mapping[str, str], wnids: set[str], labels: Mapping[str, int]
    ) -> list[Item]:
        entries = {_file_name(name): name for name in val if is_image_name(name)}
        if strangers := sorted(set(entries) - set(annotations)):
            raise self._bad(f"val image {strangers[0]} has no annotation in {_ANNOTATIONS}")
        for file in entries:
            if annotations[file] not in wnids:
                raise self._bad(f"val image {file} is annotated with {annotations[file]!r}, which is not in wnids.txt")
        self._check_missing(sorted(set(annotations) - set(entries)), f"val images of {_ANNOTATIONS} are not there")
        wanted = ((file, name) for file, name in entries.items() if annotations[file] in labels)
        items = [self._item(name, "val", annotations[file], labels) for file, name in wanted]
        return sorted(items, key=lambda item: (item.label, item.file))

    def _item(self, name: str, split: str, wnid: str, labels: Mapping[str, int]) -> Item:
        return Item(name, f"{split}/{wnid}", check_component(_file_name(name), self.source), labels[wnid])

    def _check_missing(self, missing: list[str], what: str) -> None:
        if missing and not self.allow_missing:
            sample = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise self._bad(f"{len(missing)} {what} ({sample}); complete it, or pass --allow-missing to go without")

    def _bad(self, what: str) -> BadSource:
        return BadSource(f"{self.source.path}: {what}")


def _file_name(name: str) -> str:
    return name.rpartition("/")[2]
