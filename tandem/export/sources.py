"""Which real images an export is checked on. Free of torch."""

from collections.abc import Sequence
from pathlib import Path

from tandem.data.manifest import ImageDataset, read_dataset, read_index, spread
from tandem.errors import DatasetNotFound, InvalidRequest
from tandem.volume import Volume

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
_REMEDY = "or name image files with --images-from, or another dataset with --data"


def dataset_images(volume: Volume, dataset: str, num_images: int) -> tuple[Path, ...]:
    """Return at most `num_images` files of the val split of `dataset`, spread over its classes.

    Raises DatasetNotFound where the volume has no such images, with the remedy.
    """
    try:
        manifest = read_dataset(volume, dataset)
        if not isinstance(manifest, ImageDataset):
            raise DatasetNotFound(f"dataset {dataset!r} holds {manifest.kind}, no images")
        directory = volume.dataset(dataset)
        index = read_index(directory, "val")
    except DatasetNotFound as error:
        raise DatasetNotFound(f"no images to check the export on: {error}; {_REMEDY}") from None
    if not index:
        raise DatasetNotFound(
            f"no images to check the export on: dataset {dataset!r} has an empty val split; {_REMEDY}"
        )
    return tuple(directory / index[row][0] for row in spread(len(index), num_images))


def given_images(paths: Sequence[Path], num_images: int) -> tuple[Path, ...]:
    """Return the files in `paths`, of a folder at most `num_images` image files, in order of name.

    Raises InvalidRequest for a path that is not there, or a folder without images.
    """
    return tuple(file.absolute() for path in paths for file in _files(path, num_images))


def _files(path: Path, num_images: int) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise InvalidRequest(f"{path} is no file; --images-from takes image files and folders of them")
        return [path]
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in _SUFFIXES and each.is_file())
    if not found:
        raise InvalidRequest(f"{path} holds no images; --images-from takes image files and folders of them")
    return [found[row] for row in spread(len(found), num_images)]
