import struct
import zlib

import numpy as np
import pytest
import torch
from factories import encode, picture
from PIL import Image
from torchvision.transforms.v2 import functional

from tandem.checkpoints.card import Preprocessing
from tandem.data.images import decode_image, normalise, resize_and_crop, to_pixels
from tandem.data.raw_image import RawImage
from tandem.errors import InvalidImage

GREY = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def preprocessing(resize: int = 16, image_size: int = 16) -> Preprocessing:
    return Preprocessing(resize=resize, image_size=image_size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF"])
def test_grey_is_repeated_over_three_channels(form: str) -> None:
    pixels = decode_image(encode(GREY, form))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 8, 8)
    assert (pixels == torch.from_numpy(np.array(GREY))).all()


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "BMP"), ("RGBA", "WEBP")],
)
def test_lossless_images_give_the_pixels_that_pil_gives(mode: str, form: str) -> None:
    image = picture(1, 20, 12, mode)
    options = {"lossless": True} if form == "WEBP" else {}
    pixels = decode_image(encode(image, form, **options))
    assert pixels.shape == (3, 12, 20)
    if form != "GIF":
        assert (pixels.permute(1, 2, 0).numpy() == np.array(image.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_close_to_what_it_was(mode: str) -> None:
    image = picture(2, 24, 24, mode)
    pixels = decode_image(encode(image, "JPEG", quality=95)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pixels - np.array(image.convert("RGB")).astype(int)).mean() < 6


def test_raw_pixels_are_those_of_the_picture() -> None:
    image = picture(3, 20, 12)
    pixels = to_pixels(RawImage(20, 12, image.tobytes()))
    assert pixels.is_contiguous()
    assert torch.equal(pixels, to_pixels(encode(image, "PNG")))
    # Memory of their own: bytes must not change with them.
    assert pixels.add_(1).dtype == torch.uint8
    assert image.tobytes() == picture(3, 20, 12).tobytes()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (RawImage(0, 4, b""), "0×4 pixels; width and height"),
        (RawImage(4, -1, b""), "4×-1 pixels; width and height"),
        (RawImage(4, 4, bytes(47)), "47 bytes; 4×4 pixels of RGB are 48"),
        (RawImage(2**31 - 1, 2**31 - 1, b""), "the limit is 50,000,000"),
    ],
)
def test_raw_pixels_of_another_size_than_they_say(raw: RawImage, says: str) -> None:
    with pytest.raises(InvalidImage, match=says):
        to_pixels(raw)


@pytest.mark.parametrize("value", [200, 30_000, 65_535])
def test_sixteen_bits_of_grey_are_scaled_by_their_range(value: int) -> None:
    pixels = decode_image(encode(Image.fromarray(np.full((4, 4), value, np.uint16)), "PNG"))
    assert pixels.dtype == torch.uint8
    assert set(pixels.flatten().tolist()) == {round(value / 257)}


def test_sixteen_bits_of_colour_become_eight() -> None:
    rows = b"".join(b"\0" + struct.pack(">HHH", 65_535, 25_700, 0) * 4 for _ in range(4))
    pixels = decode_image(png(4, 4, 16, 2, rows))
    assert pixels.dtype == torch.uint8
    assert pixels[:, 0, 0].tolist() == [255, 100, 0]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    pixels = decode_image(encode(first, form, save_all=True, append_images=[second]))
    assert pixels.shape == (3, 8, 8)
    assert pixels[0].float().mean() > 240
    assert pixels[2].float().mean() < 15


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_truncated_bytes_are_refused(form: str) -> None:
    data = encode(picture(3, 200, 200), form)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(InvalidImage):
            decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"not an image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (encode(picture(1), "TIFF"), "not an image"),
        (png(8000, 8000, 8, 2, b"\0"), "64000000|8000×8000"),
        (png(100_000, 100_000, 8, 2, b"\0"), "pixels"),
    ],
    ids=["empty", "text", "postscript", "tiff", "over the limit", "bomb"],
)
def test_what_is_no_image_is_refused_before_it_takes_memory(data: bytes, says: str) -> None:
    with pytest.raises(InvalidImage, match=says):
        decode_image(data)


def test_the_limit_of_pixels_is_the_callers() -> None:
    data = encode(picture(1, 40, 40))
    assert decode_image(data, max_pixels=1600).shape == (3, 40, 40)
    with pytest.raises(InvalidImage, match="40×40 pixels; the limit is 1,599"):
        decode_image(data, max_pixels=1599)


def test_random_damage_never_raises_anything_else() -> None:
    generator = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
        data = np.frombuffer(encode(picture(4, 40, 40), form), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[generator.integers(0, len(data), 6)] = generator.integers(0, 256, 6)
            try:
                pixels = decode_image(damaged.tobytes(), max_pixels=1_000_000)
            except InvalidImage:
                continue
            assert pixels.dtype == torch.uint8
            assert pixels.shape[0] == 3


def test_resize_keeps_proportions_and_cuts_the_centre() -> None:
    pixels = torch.zeros(3, 32, 64, dtype=torch.uint8)
    pixels[:, :, 16:48] = 200
    small = resize_and_crop(pixels, preprocessing())
    assert small.shape == (3, 16, 16)
    assert small.float().mean() > 195
    same = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    assert resize_and_crop(same, preprocessing()) is same


def ordinary(pixels: torch.Tensor, resize: int, size: int) -> torch.Tensor:
    resized = functional.resize(pixels, [resize], antialias=True)
    cropped: torch.Tensor = functional.center_crop(resized, [size, size])
    return cropped


@pytest.mark.parametrize("shape", [(40, 40), (64, 48), (17, 90), (300, 41), (16, 128), (8, 8), (16, 40)])
@pytest.mark.parametrize("sizes", [(16, 16), (32, 28), (24, 30)])
def test_ordinary_images_are_resized_whole(shape: tuple[int, int], sizes: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(resize_and_crop(pixels, preprocessing(*sizes)), ordinary(pixels, *sizes))


@pytest.mark.parametrize("shape", [(40, 40), (16, 40), (1, 60_000), (60_000, 1), (24, 90), (3, 40_001)])
def test_what_is_cut_out_keeps_nothing_else_in_memory(shape: tuple[int, int]) -> None:
    pixels = resize_and_crop(torch.zeros(3, *shape, dtype=torch.uint8), preprocessing(24, 16))
    assert pixels.shape == (3, 16, 16)
    assert pixels.untyped_storage().nbytes() == 3 * 16 * 16


@pytest.mark.parametrize("size", [16, 300])
def test_of_a_thread_of_an_image_only_the_middle_is_resized(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resized, plain = list[int](), functional.resize

    def resize(pixels: torch.Tensor, to: list[int], antialias: bool) -> torch.Tensor:
        result: torch.Tensor = plain(pixels, to, antialias=antialias)
        resized.append(result.numel())
        return result

    monkeypatch.setattr(functional, "resize", resize)
    length = 300_001
    pixels = torch.zeros(3, 1, length, dtype=torch.uint8)
    pixels[:, :, length // 2] = 255
    for turned in (pixels, pixels.transpose(1, 2)):
        cut = resize_and_crop(turned, preprocessing(24, size)).float().mean(dim=0)
        # The one bright pixel is in the middle still.
        assert cut.sum(dim=0).argmax().item() in range(size // 2 - 12, size // 2 + 12)
        assert cut.sum(dim=1).argmax().item() in range(size // 2 - 12, size // 2 + 12)
    assert max(resized) <= 3 * 24 * max(9 * 24, 2 * size + 48)


def test_normalise_scales_then_shifts() -> None:
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = [(1 - 0.5) / 0.2, (1 - 0.4) / 0.3, (1 - 0.3) / 0.4]
    assert normalise(pixels, preprocessing())[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
