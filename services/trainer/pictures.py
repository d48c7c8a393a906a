"""What TensorBoard shows beside curves: misclassified images, the confusion matrix, and hyper-parameters.

The pictures are drawn by PIL from arrays, as uint8 RGB (3, H, W), as `SummaryWriter.add_image` takes them.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Counts = NDArray[np.int64]
Colour = tuple[int, int, int]

MOST_IMAGES = 36
_TILE = 128
_GAP = 10
_LINE = 15
_WHITE, _INK, _GREY, _RED = (255, 255, 255), (30, 30, 30), (215, 215, 215), (178, 24, 24)

# Viridis (van der Walt and Smith 2015) at nine even places: its lightness rises evenly, also to the colour-blind.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 45, 123),
        (59, 82, 139),
        (44, 114, 142),
        (33, 145, 140),
        (40, 174, 128),
        (94, 201, 98),
        (173, 220, 48),
        (253, 231, 37),
    ],
    dtype=np.float64,
)
_MATRIX_SIDE = 720
_MOST_NAMES = 30
_MOST_NUMBERS = 12
# More classes than that are summed in blocks, so that the picture stays one that a browser shows.
_MOST_CELLS = 1000
_NAME_WIDTH = 150
_MARGIN = 16
_BAR_WIDTH = 18
_BAR_SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


class Caption(NamedTuple):
    """What stands under an image: the words of its class, of the class that was named, and its probability, 0 to 1."""

    true: str
    predicted: str
    probability: float


def confident_mistakes(
    labels: Counts, predicted: Counts, probabilities: NDArray[np.floating], limit: int = MOST_IMAGES
) -> list[int]:
    """Return the rows of the misclassified images, those first that the network is surest of; at most `limit`.

    `labels` and `predicted` (N,) are class indices; `probabilities` (N,) are those of the predicted class.
    """
    (wrong,) = (labels != predicted).nonzero()
    order = np.argsort(-probabilities[wrong], kind="stable")
    return [int(row) for row in wrong[order[:limit]]]


def misclassified_grid(pixels: Pixels, captions: Sequence[Caption]) -> Pixels:
    """Return the first 36 of the images (N, 3, S, S), uint8, each enlarged with its caption; uint8 (3, H, W)."""
    tiles = list(zip(pixels, captions, strict=True))[:MOST_IMAGES]
    columns = max(min(6, len(tiles)), 2)
    rows = max(-(-len(tiles) // columns), 1)
    width, height = _TILE + _GAP, _TILE + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), _WHITE)
    if not tiles:
        _write(sheet, (_GAP, _GAP), "no image is misclassified", _INK, sheet.width - 2 * _GAP)
    for number, (image, caption) in enumerate(tiles):
        _draw_tile(sheet, (_GAP + number % columns * width, _GAP + number // columns * height), image, caption)
    return _to_array(sheet)


def _draw_tile(sheet: Image.Image, at: tuple[int, int], pixels: Pixels, caption: Caption) -> None:
    left, top = at
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    # Enlarged pixels stay pixels where they are few: blurring would invent what the network never saw.
    filter_ = Image.Resampling.NEAREST if image.width * 2 <= _TILE else Image.Resampling.LANCZOS
    sheet.paste(image.resize((_TILE, _TILE), filter_), at)
    share = f" {caption.probability:.0%}"
    _write(sheet, (left, top + _TILE + 1), caption.true, _INK, _TILE)
    used = _write(sheet, (left, top + _TILE + _LINE), caption.predicted, _RED, _TILE - _width(share))
    _write(sheet, (left + used, top + _TILE + _LINE), share, _RED, _TILE)


def confusion_image(matrix: Counts, names: Sequence[str]) -> Pixels:
    """Return a heat map of the confusion matrix (C, C) of counts, rows true and columns predicted; uint8 (3, H, W).

    Each row is divided by its sum; rows without images are grey. The colour goes by the square root of the share, so
    that confusions of a few percent show beside a bright diagonal. Names stand at the axes of up to 30 classes.
    """
    shares = _shares(_in_blocks(matrix))
    cell = max(min(_MATRIX_SIDE // len(shares), 120), 1)
    side = cell * len(shares)
    named = len(matrix) <= _MOST_NAMES
    room = 2 * _LINE + (min(max(_width(_plain(name)) for name in names), _NAME_WIDTH) + 8 if named else 34)
    sheet = Image.new("RGB", (room + max(side, 200) + 5 * _MARGIN + 64, room + side + 2 * _MARGIN), _WHITE)
    origin = (room, _MARGIN)
    heat = Image.fromarray(_colours(shares)).resize((side, side), Image.Resampling.NEAREST)
    sheet.paste(heat, origin)
    _outline(sheet, origin, side, side)
    if len(shares) <= _MOST_NUMBERS:
        _draw_numbers(sheet, origin, cell, shares)
    labels = _axis_labels(names) if named else _axis_numbers(len(matrix))
    _draw_axes(sheet, origin, side, cell / _block(matrix), labels)
    _draw_bar(sheet, (room + side + 2 * _MARGIN, _MARGIN), max(side, 200))
    return _to_array(sheet)


def _in_blocks(matrix: Counts) -> Counts:
    step = _block(matrix)
    if step == 1:
        return matrix
    size = -(-len(matrix) // step)
    padded = np.zeros((size * step, size * step), dtype=np.int64)
    padded[: len(matrix), : len(matrix)] = matrix
    blocks: Counts = padded.reshape(size, step, size, step).sum(axis=(1, 3))
    return blocks


def _block(matrix: Counts) -> int:
    """Return how many classes share a cell's row and column."""
    return -(-len(matrix) // _MOST_CELLS)


def _shares(matrix: Counts) -> NDArray[np.float64]:
    """Return the matrix with each row divided by its sum; NaN in rows that are empty."""
    sums = matrix.sum(axis=1, keepdims=True)
    shares = np.full(matrix.shape, np.nan)
    np.divide(matrix, sums, out=shares, where=sums > 0)
    return shares


def _colours(shares: NDArray[np.float64]) -> Pixels:
    """Return the colour of each share (…), 0 to 1, as uint8 (…, 3)."""
    places = np.sqrt(np.nan_to_num(shares)) * (len(_VIRIDIS) - 1)
    grid = np.arange(len(_VIRIDIS))
    colours = np.stack([np.interp(places, grid, channel) for channel in _VIRIDIS.T], axis=-1)
    colours[np.isnan(shares)] = _GREY
    return colours.round().astype(np.uint8)


def _draw_numbers(sheet: Image.Image, origin: tuple[int, int], cell: int, shares: NDArray[np.float64]) -> None:
    canvas = ImageDraw.Draw(sheet)
    for row, column in np.ndindex(shares.shape):
        share = shares[row, column]
        if share > 0:
            at = (origin[0] + (column + 0.5) * cell, origin[1] + (row + 0.5) * cell)
            colour = _INK if share > 0.4 else _WHITE
            canvas.text(at, f"{share:.0%}", fill=colour, font=_font(), anchor="mm")


def _axis_labels(names: Sequence[str]) -> list[tuple[int, str]]:
    return list(enumerate(names))


def _axis_numbers(num_classes: int) -> list[tuple[int, str]]:
    """Return about ten round class indices."""
    steps = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
    step = next((step for step in steps if num_classes / step <= 10), 10_000)
    return [(index, str(index)) for index in range(0, num_classes, step)]


def _draw_axes(
    sheet: Image.Image, origin: tuple[int, int], side: int, pitch: float, labels: Sequence[tuple[int, str]]
) -> None:
    """Write names and titles: the true class down the left, the predicted one under the matrix, turned."""
    left, top = origin
    for index, name in labels:
        middle = (index + 0.5) * pitch
        text = _text_image(name, _INK, left - 2 * _LINE - 8)
        sheet.paste(text, (left - 6 - text.width, round(top + middle - text.height / 2)))
        turned = text.rotate(90, expand=True)
        sheet.paste(turned, (round(left + middle - turned.width / 2), top + side + 6))
    title = _text_image("true class", _INK, side)
    sheet.paste(title.rotate(90, expand=True), (2, max(top + (side - title.width) // 2, 0)))
    title = _text_image("predicted class", _INK, sheet.width)
    sheet.paste(title, (max(left + (side - title.width) // 2, 0), sheet.height - title.height - 2))


def _draw_bar(sheet: Image.Image, at: tuple[int, int], height: int) -> None:
    """Draw the colours with the shares that they stand for, in percent of the images of the true class."""
    left, top = at
    shares = np.linspace(1, 0, height)[:, None] ** 2
    sheet.paste(Image.fromarray(_colours(shares)).resize((_BAR_WIDTH, height)), at)
    _outline(sheet, at, _BAR_WIDTH, height)
    for share in _BAR_SHARES:
        middle = top + round((1 - share**0.5) * (height - 1))
        text = _text_image(f"{share:.0%}", _INK, 60)
        sheet.paste(text, (left + _BAR_WIDTH + 6, max(middle - text.height // 2, 0)))


def _outline(sheet: Image.Image, at: tuple[int, int], width: int, height: int) -> None:
    left, top = at
    ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + width, top + height), outline=_INK)


def _write(sheet: Image.Image, at: tuple[int, int], text: str, colour: Colour, width: int) -> int:
    """Write `text`, cut to `width` pixels; return the width that it takes."""
    image = _text_image(text, colour, width)
    sheet.paste(image, at)
    return image.width


def _text_image(text: str, colour: Colour, width: int) -> Image.Image:
    """Return `text` on white, cut with an ellipsis to at most `width` pixels, one line high."""
    text = _cut(_plain(text), width)
    image = Image.new("RGB", (max(_width(text), 1), _LINE), _WHITE)
    ImageDraw.Draw(image).text((0, _LINE - 4), text, fill=colour, font=_font(), anchor="ls")
    return image


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    while text and _width(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _plain(text: str) -> str:
    """Return what can be drawn of `text` in one line.

    PIL's own font has no accents, so letters go without them; what it lacks beyond that is drawn as a box.
    """
    text = unicodedata.normalize("NFKD", text[:200].encode("utf-8", "replace").decode())
    kinds = [(each, unicodedata.category(each)) for each in text]
    return "".join(" " if kind[0] in "CZ" else each for each, kind in kinds if kind != "Mn")


def _width(text: str) -> int:
    return int(np.ceil(_font().getlength(text)))


@cache
def _font() -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    return ImageFont.load_default(11)


def _to_array(sheet: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(sheet, dtype=np.uint8).transpose(2, 0, 1))


def log_hparams(writer: Any, values: Mapping[str, int | float | str | bool], metrics: Mapping[str, float]) -> None:
    """Put a run on TensorBoard's HParams page: its hyper-parameters and its final metrics, as `final/<name>`.

    `writer` is the run's own SummaryWriter: `add_hparams` would begin a run of its own within it. The description of
    the experiment is left out: TensorBoard takes one run's for all of them, and hides what others have beyond it;
    without, it gathers the names from all runs.
    """
    from torch.utils.tensorboard.summary import hparams

    # torch writes a bool as the number 1.0 or 0.0.
    readable = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
    _experiment, start, end = hparams(readable, {})  # type: ignore[no-untyped-call]
    writer.file_writer.add_summary(start)
    writer.file_writer.add_summary(end)
    for name, value in metrics.items():
        writer.add_scalar(f"final/{name}", value)
