"""Augmentation: batches and single images, as functions of their draws alone, and the same as torchvision's."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from tandem.checkpoints.card import Preprocessing
from tandem.data import augment
from tandem.data.augment import Augmentation, augment_batch, draw
from tandem.data.images import resize_and_crop
from tandem.data.single_images import Key, SingleImages, collate
from tandem.data.splits import PackedSplit
from tandem.errors import TrainingFailed

SIDE = 32
PREPROCESSING = Preprocessing(resize=SIDE, image_size=SIDE, mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5))
SHIFT, RESIZED = Augmentation("shift", True), Augmentation("resized", True)


def images(count: int = 24, height: int = SIDE, width: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def draws(count: int, seed: int = 0) -> Tensor:
    return draw(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [32, 24, 48])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 56)])
def test_random_parts_are_what_torchvision_makes_of_the_same_boxes(size: int, height: int, width: int) -> None:
    pixels, numbers = images(24, height, width), draws(24)
    result = augment_batch(pixels, numbers, RESIZED, PREPROCESSING, size)
    boxes = augment._random_parts(numbers, height, width, RESIZED.min_crop_area)
    for row, (top, left, tall, wide) in enumerate(zip(*(each.tolist() for each in boxes), strict=True)):
        box = int(top), int(left), int(tall), int(wide)
        assert 0 <= top <= height - tall
        assert 0 <= left <= width - wide
        expected = reference.resized_crop(pixels[row].float(), *box, [size, size], antialias=True)
        if numbers[row, 4] < 0.5:
            expected = expected.flip(-1)
        torch.testing.assert_close(result[row], expected, atol=2e-3, rtol=0)


def test_shifts_are_whole_pixels_of_an_image_padded_by_reflection() -> None:
    pixels, numbers = images(), draws(24)
    result = augment_batch(pixels, numbers, SHIFT, PREPROCESSING, SIDE)
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4), mode="reflect")
    tops, lefts = ((numbers[:, column] * 9).long().tolist() for column in (0, 1))
    for row, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        expected = padded[row, :, top : top + SIDE, left : left + SIDE]
        assert torch.equal(result[row], (expected.flip(-1) if numbers[row, 4] < 0.5 else expected).float())
    assert len(set(zip(tops, lefts, strict=True))) > 10, "the images move differently"


def test_areas_and_shapes_of_random_parts_cover_their_range() -> None:
    top, _, tall, wide = augment._random_parts(draws(4000), 100, 100, 0.25)
    share, ratio = tall * wide / 1e4, wide / tall
    assert share.min() < 0.28
    assert share.max() > 0.97
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.35
    assert top.max() > 40


@pytest.mark.parametrize("crop", ["shift", "resized"])
def test_a_batch_is_a_function_of_its_draws_image_by_image(crop: str) -> None:
    pixels, augmentation = images(), Augmentation(crop, True)  # type: ignore[arg-type]
    whole = augment_batch(pixels, draws(24), augmentation, PREPROCESSING, SIDE)
    assert torch.equal(whole, augment_batch(pixels, draws(24), augmentation, PREPROCESSING, SIDE))
    assert not torch.equal(whole, augment_batch(pixels, draws(24, seed=1), augmentation, PREPROCESSING, SIDE))
    half = augment_batch(pixels[::2], draws(24)[::2], augmentation, PREPROCESSING, SIDE)
    torch.testing.assert_close(half, whole[::2], atol=1e-3, rtol=0)


def test_without_a_crop_training_sees_what_evaluation_sees() -> None:
    pixels = images(8, 40, 56)
    plain = augment_batch(pixels, draws(8), Augmentation("none", False), PREPROCESSING, SIDE)
    assert torch.equal(plain, resize_and_crop(pixels, PREPROCESSING))
    flipped = augment_batch(pixels, draws(8), Augmentation("none", True), PREPROCESSING, SIDE)
    same = [torch.equal(flipped[row], plain[row]) for row in range(8)]
    assert all(is_same or torch.equal(flipped[row].flip(-1), plain[row]) for row, is_same in enumerate(same))
    assert 0 < sum(same) < 8


def test_another_size_shows_the_same_part_of_the_image() -> None:
    cut = Preprocessing(resize=256, image_size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert cut.at_size(112).resize == 128
    assert cut.at_size(224) is cut
    small = augment_batch(images(), draws(24), SHIFT, PREPROCESSING, 16)
    assert small.shape == (24, 3, 16, 16)


def split_of(pixels: Tensor) -> PackedSplit:
    count = len(pixels)
    names = [str(row) for row in range(count)]
    return PackedSplit(pixels.numpy(), torch.arange(count), torch.zeros(count, dtype=torch.int64), names, PREPROCESSING)


EVERYTHING = Augmentation(
    "resized", True, min_crop_area=0.3, color_jitter=0.4, auto_augment="randaugment", random_erasing=0.5
)


@pytest.mark.parametrize(
    "augmentation",
    [EVERYTHING, Augmentation("shift", False, auto_augment="trivialaugment"), Augmentation("none", True, 0.5, 0.9)],
)
def test_single_images_are_a_function_of_their_key(augmentation: Augmentation) -> None:
    single = SingleImages(split_of(images()), augmentation, PREPROCESSING)
    torch.manual_seed(7)
    first = [single[Key(row, 100 + row, SIDE)] for row in range(6)]
    torch.manual_seed(8)
    again = [single[Key(row, 100 + row, SIDE)] for row in range(6)]
    other = [single[Key(row, 200 + row, SIDE)] for row in range(6)]
    assert torch.equal(collate(first), collate(again))  # type: ignore[arg-type]
    assert not torch.equal(collate(first), collate(other))  # type: ignore[arg-type]
    batch = collate([single[Key(0, 1, 24)]])
    assert isinstance(batch, Tensor)
    assert batch.shape == (1, 3, 24, 24)
    assert batch.dtype == torch.uint8


class Damaged(PackedSplit):
    def image(self, row: int) -> Tensor:
        raise TrainingFailed(f"{self.files[row]} can't be used")


def test_an_image_that_does_not_decode_comes_as_its_message() -> None:
    pixels = images(2)
    damaged = Damaged(pixels.numpy(), torch.arange(2), torch.zeros(2), ["a.png", "b.png"], PREPROCESSING)
    single = SingleImages(damaged, SHIFT, PREPROCESSING)
    assert collate([pixels[0], single[Key(1, 0, SIDE)]]) == "b.png can't be used"
