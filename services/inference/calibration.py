"""Images that show what a classifier's activations are like: of the data that it was trained on, where they are."""

import logging

import torch
from torch import Tensor

from services.inference.runtimes.check import check_pixels
from services.inference.runtimes.int8 import NUM_CALIBRATION
from tandem.checkpoints.card import ClassifierCard
from tandem.data.manifest import ImageDataset, read_dataset
from tandem.data.splits import open_split
from tandem.errors import TandemError
from tandem.volume import Volume

log = logging.getLogger("tandem.inference.runtimes")

# Not val: what a model is measured on later should have had no part in it.
_SPLIT = "train"


def calibration_pixels(volume: Volume, card: ClassifierCard) -> Tensor:
    """Return uint8 (N, 3, S, S), spread over the classes of the model's own training data.

    Where the volume has none, or others by that name, made-up images (`check_pixels`) stand in: the log says so.
    """
    size = card.preprocessing.image_size
    try:
        dataset = read_dataset(volume, card.dataset)
        if not isinstance(dataset, ImageDataset) or dataset.fingerprint != card.dataset_fingerprint:
            raise TandemError(f"dataset {card.dataset!r} is not what the model was trained on")
        directory = volume.dataset(card.dataset)
        split = open_split(directory, dataset, _SPLIT, card.preprocessing, NUM_CALIBRATION)
        return split.eval_batch(torch.arange(len(split.files)))
    except (TandemError, OSError) as error:
        log.warning("calibrated on made-up images, so int8 may be further off than it need be: %s", error)
        return check_pixels(size)
