"""Small real datasets, made by the project's own prepare commands."""

import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tandem.data.manifest import ImageDataset, TextDataset
from tandem.data.prepare.image_folder import prepare_image_folder
from tandem.data.prepare.text import prepare_text
from tandem.volume import Volume

SHAPES = ("circle", "cross", "square")


def draw_shape(kind: str, seed: int, size: int = 32) -> Image.Image:
    """Return a noisy picture of a shape of some colour."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 60, (size, size, 3), dtype=np.uint8))
    canvas = ImageDraw.Draw(image)
    left, top = (int(each) for each in rng.integers(2, size // 3, 2))
    box = (left, top, left + size // 2, top + size // 2)
    colour = tuple(int(each) for each in rng.integers(120, 256, 3))
    if kind == "circle":
        canvas.ellipse(box, fill=colour)
    elif kind == "square":
        canvas.rectangle(box, fill=colour)
    else:
        canvas.line(box, fill=colour, width=4)
        canvas.line((box[0], box[3], box[2], box[1]), fill=colour, width=4)
    return image


def write_shapes(folder: Path, each: int = 20, val_each: int = 5, size: int = 32) -> Path:
    """Write class folders of shapes below train/ and val/."""
    for split, count in (("train", each), ("val", val_each)):
        for label, kind in enumerate(SHAPES):
            directory = folder / split / kind
            directory.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                seed = hash((split == "val", label, number)) % 2**32
                draw_shape(kind, seed, size).save(directory / f"{kind}_{number}.png")
    return folder


def write_image_dataset(volume: Volume, name: str) -> ImageDataset:
    """Prepare a dataset of 60 train and 15 val shapes."""
    return prepare_image_folder(volume, write_shapes(volume.home / "source" / name), name)


def write_sentences(path: Path, lines: int = 400) -> Path:
    """Write sentences of a small grammar, so that a model can learn something."""
    rng = random.Random(0)
    subjects, verbs, objects = (
        ("the cat", "the dog", "a bird"),
        ("sees", "likes", "chases"),
        ("the ball", "a fish", "rain"),
    )
    text = [f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)} ." for _ in range(lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text) + "\n", "utf-8")
    return path


def write_text_dataset(volume: Volume, name: str) -> TextDataset:
    """Prepare a dataset of 400 sentences."""
    return prepare_text(volume, write_sentences(volume.home / "source" / f"{name}.txt"), name)
