"""Few bytes that would be many pixels, or much work: refused by their header, or within what is bounded."""

import asyncio
import io
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from factories import encode, png
from PIL import Image
from torch import Tensor

from services.inference import decoding
from services.inference.decoding import Decoder, PixelBudget
from tandem.checkpoints.card import Preprocessing
from tandem.data.images import decode_image, to_pixels
from tandem.data.jpeg import has_more_scans
from tandem.data.raw_image import RawImage
from tandem.errors import InvalidImage, LimitExceeded
from tandem.wire.limits import MAX_PIXELS, MAX_SCANS

PREPROCESSING = Preprocessing(resize=32, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def gif_of(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    descriptor = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0)
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6) + descriptor + b"\x02\x02\x44\x01\x00;"


def webp_of(size: int) -> bytes:
    """Return an animation on a canvas of so many pixels squared, with a frame of 8×8."""
    canvas = struct.pack("<I", size - 1)[:3]
    still = encoded(Image.new("RGB", (8, 8)), "WEBP")[12:]
    frame = bytes(6) + struct.pack("<I", 7)[:3] * 2 + b"\x64\0\0\0" + still
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + canvas * 2
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_of(width: int, height: int, compression: int = 0, data: bytes = b"") -> bytes:
    offset = 14 + 40 + 1024
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + bytes(1024) + data


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 2^62 pixels": lambda: png_of(2**31 - 1, 2**31 - 1),
    "png of 60,000 squared": lambda: png_of(60_000, 60_000),
    "png of 50,000,001 pixels": lambda: png_of(50_000_001, 1),
    "gif of 65,535 squared": lambda: gif_of((65_535, 65_535), (65_535, 65_535)),
    "gif whose frame is larger than its screen": lambda: gif_of((1, 1), (65_535, 65_535)),
    "webp of 16,383 squared": lambda: webp_of(16_383),
    "webp of 2^48 pixels": lambda: webp_of(2**24),
    "bmp of 2^60 pixels": lambda: bmp_of(2**30, 2**30),
    "bmp of negative size": lambda: bmp_of(-5, -5),
    "png cut off after its header": lambda: png_of(7000, 7000),
    "png with a text of 300 MB": lambda: png_of(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(300_000_000)))),
    "png with a profile of 300 MB": lambda: png_of(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(300_000_000)))),
    "bmp whose runs end early": lambda: bmp_of(500, 500, 1, b"\x01\x05" * 100 + b"\0\1"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_and_take_no_memory(name: str) -> None:
    data = BOMBS[name]()
    assert len(data) < 400_000
    # What is imported with the first image of a format is not the bomb's.
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        decode_image(encoded(Image.new("RGB", (2, 2)), form))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidImage) as caught:
            decode_image(data)
        # Python's own; the decoders' buffers are counted by the pixels that the message names.
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8_000_000
    assert "\n" not in str(caught.value)


def test_of_a_thousand_frames_one_is_decoded() -> None:
    first = Image.new("P", (64, 64))
    frames = [Image.new("P", (64, 64), number % 250 + 1) for number in range(1000)]
    assert decode_image(encoded(first, "GIF", save_all=True, append_images=frames)).shape == (3, 64, 64)


@pytest.mark.parametrize("num_segments", [1, 100])
def test_megabytes_of_metadata_do_not_matter(num_segments: int) -> None:
    jpeg = encoded(Image.new("RGB", (16, 16), (200, 10, 10)), "JPEG")
    # Full of what looks like scans.
    exif = b"Exif\0\0" + b"\xff\xda" * 32_000
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert decode_image(jpeg[:2] + segment * num_segments + jpeg[2:]).shape == (3, 16, 16)
    # A film behind the picture, as telephones write it.
    assert decode_image(jpeg + b"\xff\xda\x00\x02" * 1000).shape == (3, 16, 16)


@pytest.mark.parametrize("is_progressive", [True, False])
def test_a_jpeg_of_countless_scans_is_refused(is_progressive: bool) -> None:
    jpeg = encoded(Image.new("L", (64, 64), 90), "JPEG", progressive=is_progressive)
    begin = jpeg.rfind(b"\xff\xda")
    num_scans = jpeg.count(b"\xff\xda")
    scan, end = jpeg[begin:-2], jpeg[-2:]
    with pytest.raises(InvalidImage, match="more than 100 scans"):
        decode_image(jpeg[:-2] + scan * MAX_SCANS + end)
    at_limit = jpeg[:-2] + scan * (MAX_SCANS - num_scans) + end
    assert not has_more_scans(at_limit, MAX_SCANS)
    assert has_more_scans(at_limit, MAX_SCANS - 1)
    assert decode_image(jpeg).shape == (3, 64, 64)


async def test_the_images_of_a_message_have_a_budget_of_pixels() -> None:
    decoder, images = Decoder(2), [png(number) for number in range(40)]
    sources = [lambda image=image: image for image in images]
    num_pixels = sum(decode_image(image)[0].numel() for image in images)
    try:
        batch = await decoder.decode(sources, [PREPROCESSING], PixelBudget(num_pixels))
        assert len(batch.indices) == 40
        with pytest.raises(LimitExceeded, match=f"more than {num_pixels - 1:,} pixels in all"):
            await decoder.decode(sources, [PREPROCESSING], PixelBudget(num_pixels - 1))
        # What was refused leaves the decoder to others.
        assert len((await asyncio.wait_for(decoder.decode(sources, [PREPROCESSING]), 30)).indices) == 40
    finally:
        decoder.close()


def as_it_is(image: bytes | RawImage) -> bytes | RawImage:
    return image


async def test_only_what_is_small_whatever_it_holds_is_decoded_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, threads = threading.current_thread(), list[threading.Thread]()

    def watched(image: bytes | RawImage, max_pixels: int = MAX_PIXELS) -> Tensor:
        pixels = to_pixels(image, max_pixels)
        threads.append(threading.current_thread())
        return pixels

    monkeypatch.setattr(decoding, "to_pixels", watched)
    decoder, small, damaged = Decoder(2), png(0), png(0)[:60]
    wide = encode(Image.new("RGB", (300, 300)))
    assert len(wide) < 1000 < 300 * 300
    large = PREPROCESSING.model_copy(update={"image_size": 224, "resize": 224})
    try:
        for image, preprocessing, is_here in (
            (small, PREPROCESSING, True),
            (RawImage(8, 8, bytes(3 * 8 * 8)), PREPROCESSING, True),
            (wide, PREPROCESSING, False),
            (small, large, False),
        ):
            threads.clear()
            batch = await decoder.decode([partial(as_it_is, image)], [preprocessing], PixelBudget(), at_hand=True)
            assert len(batch.indices) == 1
            assert [each is here for each in threads] == [is_here]
            in_threads = await decoder.decode([partial(as_it_is, image)], [preprocessing], PixelBudget())
            assert torch.equal(in_threads.pixels[0], batch.pixels[0])
        (error,) = (await decoder.decode([lambda: damaged], [PREPROCESSING], at_hand=True)).errors
        assert error == (await decoder.decode([lambda: damaged], [PREPROCESSING])).errors[0] != ""
    finally:
        decoder.close()
