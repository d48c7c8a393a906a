from pathlib import Path

import numpy as np
import pytest
from prepare_samples import Recorder, visible

from tandem.data.images import decode_image
from tandem.data.manifest import read_dataset, read_index, read_sizes
from tandem.data.prepare import prepare_dummy
from tandem.data.prepare.dummy import Dummy
from tandem.data.progress import Progress
from tandem.errors import Conflict, InvalidRequest
from tandem.volume import Volume


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return Volume(tmp_path / "home")


def small(
    volume: Volume,
    name: str = "dummy",
    *,
    num_classes: int = 3,
    num_images: int = 20,
    num_val_images: int = 7,
    image_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> str:
    """Prepare a few images; return the fingerprint."""
    return prepare_dummy(
        volume,
        name,
        num_classes=num_classes,
        num_images=num_images,
        num_val_images=num_val_images,
        image_size=image_size,
        seed=seed,
        progress=progress,
    ).fingerprint


def test_it_is_an_ordinary_packed_dataset(volume: Volume) -> None:
    small(volume)
    dataset = read_dataset(volume, "dummy")
    assert dataset.kind == "images"
    assert dataset.num_images == {"train": 20, "val": 7}
    assert (dataset.image_size, dataset.packed, dataset.source) == ((16, 16), True, "dummy")
    assert visible(volume.datasets) == ["dummy"]
    directory = volume.dataset("dummy")
    for split in ("train", "val"):
        index = read_index(directory, split)
        labels = [label for _, label in index]
        counts = np.bincount(labels, minlength=3)
        assert labels == sorted(labels)
        assert counts.max() - counts.min() <= 1
        assert read_sizes(directory, split) == [(directory / file).stat().st_size for file, _ in index]
        packed = np.load(directory / "packed" / f"{split}.npy")
        decoded = [decode_image((directory / file).read_bytes()).numpy() for file, _ in index]
        assert np.array_equal(packed, np.stack(decoded))


def test_large_images_are_not_packed(volume: Volume) -> None:
    small(volume, image_size=128, num_images=4, num_val_images=2)
    dataset = read_dataset(volume, "dummy")
    assert dataset.kind == "images"
    assert (dataset.image_size, dataset.packed) == ((128, 128), False)


def test_pixels_are_a_function_of_the_seed(volume: Volume) -> None:
    first = small(volume)
    assert small(volume, "again") == first
    assert small(volume, "other", seed=1) != first
    pixels = np.load(volume.dataset("dummy") / "packed/train.npy")
    assert len({row.tobytes() for row in pixels}) == 20


def test_the_pixels_of_seed_0_stay_what_they_are(volume: Volume) -> None:
    small(volume)
    pixels = np.load(volume.dataset("dummy") / "packed/train.npy")
    assert pixels[0, :, 0, :4].tolist() == [[115, 200, 154, 190], [147, 165, 16, 113], [67, 101, 108, 111]]


def test_a_class_shows_in_its_colour_and_an_image_in_its_noise(volume: Volume) -> None:
    small(volume, num_images=300)
    pixels = np.load(volume.dataset("dummy") / "packed/train.npy").astype(float)
    labels = np.array([label for _, label in read_index(volume.dataset("dummy"), "train")])
    means = pixels.mean(axis=(2, 3))
    centres = np.stack([means[labels == label].mean(axis=0) for label in range(3)])
    nearest = np.linalg.norm(means[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == labels).mean() > 0.6
    assert pixels.std(axis=(2, 3)).min() > 40


def test_preparing_it_again_does_nothing_and_other_values_conflict(volume: Volume) -> None:
    small(volume)
    progress = Recorder()
    small(volume, progress=progress)
    assert "preparing images" not in progress.stages
    with pytest.raises(Conflict, match=r"'dummy' is there already, prepared from dummy .*--force"):
        small(volume, num_images=21)


def test_an_interrupted_preparation_goes_on(volume: Volume) -> None:
    whole = small(volume, "whole")
    with pytest.raises(KeyboardInterrupt):
        small(volume, progress=Recorder(interrupt_at=1))
    assert visible(volume.datasets) == [".dummy.partial", "whole"]
    assert small(volume) == whole
    assert visible(volume.datasets) == ["dummy", "whole"]


@pytest.mark.parametrize(
    ("field", "value"), [("classes", 1), ("images", 2), ("val_images", 0), ("image_size", 7), ("image_size", 1025)]
)
def test_values_that_give_no_dataset(field: str, value: int) -> None:
    values = {"classes": 3, "images": 20, "val_images": 7, "image_size": 16} | {field: value}
    with pytest.raises(InvalidRequest) as caught:
        Dummy(values["classes"], values["images"], values["val_images"], values["image_size"], seed=0)
    assert caught.value.field == field
