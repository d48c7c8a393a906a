import io

import numpy as np
import pytest
from PIL import Image
from prepare_samples import deep_colour_png, deep_grey, encode, picture

from tandem.data.images import decode_image
from tandem.data.prepare.images import MAX_PIXELS, prepare_image
from tandem.errors import BadSource


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_plain_image_keeps_its_bytes(form: str) -> None:
    data = encode(picture(), form)
    prepared = prepare_image(data, "a")
    assert (prepared.data, prepared.suffix, prepared.converted) == (data, "", False)
    assert prepared.height_width == (8, 8)


def transparent() -> Image.Image:
    image = picture(mode="RGBA")
    image.putalpha(100)
    return image


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (picture(mode="L"), "PNG"),
        (picture(mode="1"), "PNG"),
        (picture(mode="P"), "PNG"),
        (picture(mode="P"), "GIF"),
        (picture(mode="LA"), "PNG"),
        (transparent(), "PNG"),
        (transparent(), "WEBP"),
        (picture(mode="CMYK"), "JPEG"),
        (picture(mode="CMYK"), "TIFF"),
        (deep_grey(), "PNG"),
        (deep_grey(), "TIFF"),
        (picture(), "BMP"),
        (picture(), "TIFF"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_other_images_become_pngs_that_hold_what_serving_would_see(image: Image.Image, form: str) -> None:
    data = encode(image, form)
    prepared = prepare_image(data, "a.img")
    assert (prepared.converted, prepared.suffix) == (True, ".png")
    with Image.open(io.BytesIO(prepared.data)) as written:
        assert (written.mode, written.format) == ("RGB", "PNG")
    assert np.array_equal(prepared.pixels(), decode_image(prepared.data).numpy())
    if form != "TIFF":  # which is prepared, and not served
        # The same picture sent to the server is decoded to the same pixels as the model was trained on.
        assert np.array_equal(prepared.pixels(), decode_image(data).numpy())


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [picture(seed) for seed in (0, 5)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as animation:
        first = np.asarray(animation.convert("RGB"))
    assert np.array_equal(prepare_image(data, "a.gif").pixels().transpose(1, 2, 0), first)


def test_a_sixteen_bit_colour_png_is_written_with_eight_bits() -> None:
    prepared = prepare_image(deep_colour_png(), "a.png")
    assert (prepared.converted, prepared.suffix) == (True, "")
    assert np.array_equal(prepared.pixels(), decode_image(prepared.data).numpy())


def test_a_palette_with_transparency_becomes_plain_rgb() -> None:
    data = encode(picture(mode="P"), "PNG", transparency=3)
    prepared = prepare_image(data, "a.png")
    assert (prepared.converted, prepared.suffix) == (True, "")
    assert np.array_equal(prepared.pixels(), decode_image(data).numpy())


def test_a_jpeg_with_a_second_picture_is_kept_and_the_first_counts() -> None:
    frames = [picture(seed, size=(16, 16)) for seed in (0, 5)]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    prepared = prepare_image(data, "a.jpg")
    assert (prepared.data, prepared.converted) == (data, False)
    assert np.array_equal(prepared.pixels(), decode_image(data).numpy())


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_jpegs_give_the_pixels_of_training_and_serving(size: tuple[int, int], subsampling: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG", quality=70, subsampling=subsampling)
    assert np.array_equal(prepare_image(data, "a.jpg").pixels(), decode_image(data).numpy())


def test_an_image_with_too_many_pixels_is_refused_by_its_header() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    data = encode(Image.new("1", (side, side)), "PNG")
    assert len(data) < 100_000
    with pytest.raises(BadSource, match=r"a\.png has 7072×7072 pixels"):
        prepare_image(data, "a.png")


def test_jpegs_that_claim_too_many_pixels_are_refused_by_their_header() -> None:
    data = bytearray(encode(picture()))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(BadSource, match=r"a\.jpg has 65535×65535 pixels"):
        prepare_image(bytes(data), "a.jpg")


def corrupt_jpeg() -> bytes:
    """A JPEG whose Huffman table is damaged."""
    data = bytearray(encode(picture(size=(64, 64))))
    at = data.index(b"\xff\xc4")
    data[at + 5 : at + 21] = b"\xff" * 16
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", b"\xff\xd8\xff\xe0", encode(picture())[:-50], corrupt_jpeg(), encode(picture(), "PNG")[:60]],
    ids=["empty", "gif", "start", "truncated", "corrupt", "png"],
)
def test_what_does_not_decode_is_named_in_one_line_with_the_remedy(data: bytes) -> None:
    with pytest.raises(BadSource, match=r"^x/bad\.jpg does not decode.*; replace it, or remove it from") as caught:
        prepare_image(data, "x/bad.jpg")
    assert "\n" not in str(caught.value)


def test_formats_that_run_programs_are_no_images() -> None:
    with pytest.raises(BadSource):
        prepare_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.jpg")
