"""What int8 is fitted to: the model's own training data, and made-up images where they are not to be had."""

import logging
from pathlib import Path

import pytest
import torch
from factories import classifier_card
from samples import write_image_dataset

from services.inference.calibration import calibration_pixels
from services.inference.runtimes.check import check_pixels
from tandem.checkpoints.card import Preprocessing
from tandem.data.splits import open_split
from tandem.volume import Volume

PREPROCESSING = Preprocessing(resize=24, image_size=24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def test_it_is_the_data_that_the_model_was_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume = Volume(tmp_path)
    dataset = write_image_dataset(volume, "shapes")
    update = {"dataset": "shapes", "dataset_fingerprint": dataset.fingerprint, "preprocessing": PREPROCESSING}
    card = classifier_card().model_copy(update=update)
    pixels = calibration_pixels(volume, card)
    split = open_split(volume.dataset("shapes"), dataset, "train", PREPROCESSING, None)
    assert torch.equal(pixels, split.eval_batch(torch.arange(60)))
    assert not caplog.records
    for changes in ({"dataset_fingerprint": "0" * 64}, {"dataset": "gone"}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made_up = calibration_pixels(volume, card.model_copy(update=changes))
        assert torch.equal(made_up, check_pixels(24))
        assert "calibrated on made-up images" in caplog.text
