"""A person's own pictures: a folder or zip with one folder for each class.

Either `train/<class>/…` and `val/<class>/…` (`valid`, `validation` or `test` also serve as val, the first that is
there), or `<class>/…` alone, from which a part is drawn for val. Folders below a class folder count to the class.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.data.manifest import ClassName, ImageDataset
from tandem.data.prepare.archives import open_random_access
from tandem.data.prepare.image_dataset import ImageJob, check_splits
from tandem.data.prepare.image_writer import Item
from tandem.data.prepare.images import EXTENSIONS, is_image_name
from tandem.data.prepare.sources import Source, check_component
from tandem.data.prepare.staging import Preparation
from tandem.data.progress import Progress, Silent
from tandem.errors import BadSource, InvalidRequest
from tandem.volume import Volume

_VAL_FOLDERS = ("val", "valid", "validation", "test")

# {class name: {image in the source: file name in the dataset}}; a/b.png below a class folder becomes a__b.png.
ImagesByClass = dict[str, dict[str, str]]


def prepare_image_folder(
    volume: Volume,
    source: str | Path,
    name: str,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> ImageDataset:
    """Prepare class folders, from a folder, a zip or its address, as dataset `name`; return the manifest.

    Without a val folder, `val_fraction` (between 0 and 1) of each class is drawn by `seed`: at least one image of a
    class of two or more. Raises what `Preparation.run` does.
    """
    if not 0 < val_fraction < 1:
        raise InvalidRequest(f"val_fraction {val_fraction} is not between 0 and 1", field="val_fraction")
    recipe = ImageFolder(val_fraction, seed)
    return Preparation(volume, name, str(source), recipe, ImageDataset, force, progress or Silent()).run()


@dataclass(frozen=True)
class ImageFolder:
    """The recipe; see `prepare_image_folder`."""

    val_fraction: float = 0.1
    seed: int = 0
    name: str = "image-folder"

    @property
    def options(self) -> Mapping[str, float | int]:
        """What changes the outcome."""
        return {"val_fraction": self.val_fraction, "seed": self.seed}

    def open(self, path: Path, progress: Progress) -> ImageJob:
        """Look through the source at `path`; raise BadSource if it has no two class folders with images."""
        progress.start("looking through the source", None)
        source = open_random_access(path)
        top = _find_top(source)
        train, val = self._find_splits(source, top)
        labels = {name: label for label, name in enumerate(sorted(train))}
        splits = {"train": _items("train", train, labels), "val": _items("val", val, labels)}
        check_splits(source, splits, len(labels))
        stamps = source.files(top)
        used = {f"{item.folder}/{item.file}": stamps[item.entry] for items in splits.values() for item in items}
        return ImageJob(source, tuple(ClassName(id=name, words=name) for name in labels), splits, used)

    def _find_splits(self, source: Source, top: str) -> tuple[ImagesByClass, ImagesByClass]:
        folders = source.folders(top)
        if "train" not in folders:
            return self._draw(_class_folders(source, top))
        train = _class_folders(source, f"{top}train/")
        val_folder = next((folder for folder in _VAL_FOLDERS if folder in folders), None)
        if val_folder is None:
            return self._draw(train)
        val = _class_folders(source, f"{top}{val_folder}/")
        if unknown := sorted(set(val) - set(train)):
            raise BadSource(
                f"{source.path}: class {unknown[0]!r} is in {val_folder}/ and not in train/; remove it, or add it to "
                "train/ with images"
            )
        return train, val

    def _draw(self, images: ImagesByClass) -> tuple[ImagesByClass, ImagesByClass]:
        """Part the images of each class into train and val, by class name and seed alone."""
        train: ImagesByClass = {}
        val: ImagesByClass = {}
        for name, entries in images.items():
            shuffled = sorted(entries)
            random.Random(f"{self.seed}/{name}").shuffle(shuffled)
            num_val = min(max(1, round(len(entries) * self.val_fraction)), len(entries) - 1)
            val[name] = {entry: entries[entry] for entry in shuffled[:num_val]}
            train[name] = {entry: entries[entry] for entry in shuffled[num_val:]}
        return train, val


def _find_top(source: Source) -> str:
    """Return '', or 'x/' where all lies in one folder x that holds folders and no images itself (a zipped folder)."""
    folders = source.folders("")
    if len(folders) != 1 or folders == ["train"]:
        return ""
    top = f"{folders[0]}/"
    directly = (name for name in source.files(top) if "/" not in name.removeprefix(top))
    return top if source.folders(top) and not any(map(is_image_name, directly)) else ""


def _class_folders(source: Source, folder: str) -> ImagesByClass:
    """Return the images of each class folder directly in `folder`; raise BadSource for one without images."""
    images: ImagesByClass = {check_component(name, source): {} for name in source.folders(folder)}
    for entry in source.files(folder):
        class_name, slash, below = entry.removeprefix(folder).partition("/")
        if slash and is_image_name(entry):
            images[class_name][entry] = check_component(below.replace("/", "__"), source)
    for class_name, entries in images.items():
        if not entries:
            endings = " ".join(sorted(EXTENSIONS))
            raise BadSource(
                f"class folder {folder}{class_name} in {source.path} has no images ({endings}); add some, or remove it"
            )
    return images


def _items(split: str, images: ImagesByClass, labels: Mapping[str, int]) -> list[Item]:
    """Return the items of a split by label, then file name."""
    items = [
        Item(entry, f"{split}/{class_name}", file, labels[class_name])
        for class_name, entries in images.items()
        for entry, file in entries.items()
    ]
    return sorted(items, key=lambda item: (item.label, item.file))
