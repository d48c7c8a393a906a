"""How large a classifier's images will be: what its spec says, or what suits its dataset. Free of torch."""

from typing import NamedTuple

from tandem.data.manifest import ImageDataset
from tandem.errors import InvalidJob
from tandem.jobs.spec import ClassifierJob

_SMALL = 96
_DEFAULT_SIZE = 224


class Sizes(NamedTuple):
    """Pixels: the shorter side that an image is resized to, and the side of the square that is cut out of it."""

    resize: int
    image_size: int


def sizes_of(spec: ClassifierJob, dataset: ImageDataset) -> Sizes:
    """Return the sizes of evaluation and serving; raise InvalidJob where they contradict each other.

    Small images keep their whole frame; larger ones lose an eighth at the edges, as the reference does (256 to 224).
    """
    stored = dataset.image_size
    is_small = stored is not None and max(stored) <= _SMALL
    size = spec.image_size or (min(stored) if stored is not None and is_small else _DEFAULT_SIZE)
    resize = spec.resize or (size if is_small else round(size * 8 / 7))
    if resize < size:
        raise InvalidJob(f"--resize: {resize} is below the {size} pixels that are cut out; give --image-size too")
    if spec.start_size and spec.start_size > size:
        raise InvalidJob(f"--start-size: {spec.start_size} is above the final size of {size} pixels")
    return Sizes(resize, size)
