"""The images that a comparison sends back: which, how large, and within what bounds."""

import io
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from factories import encode, picture, png
from PIL import Image

from services.inference.decoding import Decoder
from services.inference.returned_images import FurthestApart, check_num_returned, returned_images
from services.inference.scheduler import Priority
from tandem.comparison.report import MAX_IMAGES
from tandem.comparison.results import Comparison, PairResult
from tandem.data.encoded import SMALL_BYTES, SMALL_SIDE, small
from tandem.errors import InvalidImage, InvalidRequest
from tandem.wire.limits import MAX_RETURNED_BYTES, MAX_RETURNED_IMAGES
from tandem.wire.requests import Collected, Received, dataset_request
from tandem.wire.v1 import inference_pb2 as pb


def noise(width: int, height: int, form: str = "PNG") -> bytes:
    """Return an image of many bytes."""
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), form)


@pytest.fixture
async def decoder() -> AsyncIterator[Decoder]:
    decoder = Decoder(2)
    yield decoder
    decoder.close()


def test_those_furthest_apart_are_kept_in_the_order_of_the_answer() -> None:
    apart = [0.2, 0.9, 0.5, 0.9, 0.0, 0.5, 0.3]
    pairs = tuple(PairResult(f"{place}.png", divergence=each) for place, each in enumerate(apart))
    ranked = [pair.name for pair in Comparison(pairs, None, None).ranked]  # type: ignore[arg-type]
    for limit in range(len(pairs) + 2):
        furthest = FurthestApart(limit)
        for pair in pairs:
            furthest.add(pair, Path("/d") / pair.name)
        assert furthest.ranked() == [(name, Path("/d") / name) for name in ranked[:limit]]


async def test_images_come_as_they_lie_and_large_ones_small(decoder: Decoder, tmp_path: Path) -> None:
    large = noise(600, 300)
    contents = {"a.png": png(1), "large.png": large, "b.png": png(2), "junk.jpg": b"\xff" * (SMALL_BYTES + 1)}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    chosen = [(name, tmp_path / name) for name in ("a.png", "gone.png", "large.png", "junk.jpg", "b.png")]
    images = [
        image for group in [each async for each in returned_images(decoder, chosen, Priority.NORMAL)] for image in group
    ]
    assert [name for name, _ in images] == ["a.png", "large.png", "b.png"]
    found = dict(images)
    assert (found["a.png"], found["b.png"]) == (contents["a.png"], contents["b.png"])
    assert Image.open(io.BytesIO(found["large.png"])).size == (256, 128)
    assert len(found["large.png"]) < SMALL_BYTES < len(large)


async def test_the_images_of_an_answer_are_bounded_in_all(decoder: Decoder, tmp_path: Path) -> None:
    for number in range(70):
        (tmp_path / f"{number}.png").write_bytes(bytes(1000))
    chosen = [(str(number), tmp_path / f"{number}.png") for number in range(70)]
    for max_bytes, expected in ((70_000, [32, 32, 6]), (40_999, [32, 8]), (32_000, [32]), (999, [])):
        groups = [len(group) async for group in returned_images(decoder, chosen, Priority.NORMAL, max_bytes)]
        assert groups == expected, max_bytes
    assert [group async for group in returned_images(decoder, [], Priority.NORMAL)] == []


def test_the_limits_fit_one_another() -> None:
    assert MAX_RETURNED_IMAGES >= MAX_IMAGES, "a page gets all of its images"
    assert MAX_RETURNED_IMAGES * SMALL_BYTES <= MAX_RETURNED_BYTES
    check_num_returned(MAX_RETURNED_IMAGES)
    for wrong in (-1, MAX_RETURNED_IMAGES + 1):
        with pytest.raises(InvalidRequest, match="1 to 500, or 0 for none") as caught:
            check_num_returned(wrong)
        assert caught.value.field == "num_returned_images"
    assert dataset_request("a", "b", "d", "val", 5, 0, 7).num_returned_images == 7


def test_images_are_collected_over_messages() -> None:
    collected = Collected(Received("images"))
    for names in (("x", "y"), ("z",)):
        collected.take(pb.CompareDatasetResponse(images=[pb.Image(name=name, data=name.encode()) for name in names]))
    answer = collected.take(pb.CompareDatasetResponse(summary=pb.ComparisonSummary(num_images=3)))
    assert isinstance(answer, Comparison)
    assert answer.images == {"x": b"x", "y": b"y", "z": b"z"}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_large_image_is_made_small_whatever_its_format(form: str) -> None:
    image = Image.open(io.BytesIO(small(noise(700, 900, form))))
    assert (image.format, image.mode, max(image.size)) == ("JPEG", "RGB", SMALL_SIDE)
    assert image.size == (199, 256)


def test_a_large_image_shows_what_was_in_it() -> None:
    plain = picture(3, 512, 512)
    shown = Image.open(io.BytesIO(small(encode(plain, "BMP"))))
    expected, found = (np.asarray(image.resize((8, 8), Image.Resampling.BOX), float) for image in (plain, shown))
    assert np.abs(found - expected).max() < 8
    grey = np.tile(np.arange(0, 65536, 128, dtype=np.uint16), (300, 1))
    grey[::2] += np.random.default_rng(1).integers(0, 128, grey[::2].shape, dtype=np.uint16)
    shown = Image.open(io.BytesIO(small(encode(Image.fromarray(grey)))))
    assert abs(int(np.asarray(shown)[..., 0].mean()) - 127) <= 2, "16-bit grey keeps its range"


def test_what_does_not_decode_is_said_to() -> None:
    whole = noise(700, 900, "JPEG")
    for data in (whole[: len(whole) // 3], b"\x89PNG\r\n\x1a\n" + bytes(SMALL_BYTES)):
        with pytest.raises(InvalidImage):
            small(data)
    assert small(b"") == b"", "what is small is not looked at"


async def test_the_decoders_threads_do_other_work_in_order(decoder: Decoder) -> None:
    assert await decoder.each(lambda number: number * 2, range(20)) == [2 * number for number in range(20)]
