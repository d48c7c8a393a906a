"""Real data without a download: scanned handwritten digits, and Python's language reference."""

import re
from pathlib import Path

from tandem.volume import replace_file

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_VAL_EACH = 5
_RULE = re.compile(r"[=*~^\-\s]{3,}")


def write_digits(folder: Path) -> Path:
    """Write scikit-learn's 1,797 scanned digits (8×8, grey) as PNG files in train/ and val/ by class.

    Every fifth is for val. They are the test part of "Optical Recognition of Handwritten Digits" (UCI, Alpaydin and
    Kaynak 1998).
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    if folder.is_dir():
        return folder
    digits = load_digits()
    partial = folder.with_name(f".{folder.name}")
    # Ink is 0 to 16 in the data; a pixel is 0 to 255, and paper is white.
    pixels = 255 - np.round(digits.images * (255 / 16)).astype(np.uint8)
    for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        split = "val" if number % _VAL_EACH == 0 else "train"
        path = partial / split / _DIGITS[label] / f"digit_{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    partial.rename(folder)
    return folder


def write_language_reference(path: Path) -> Path:
    """Write the topics of Python's `help()` as text, a paragraph on each line: about 60,000 words."""
    from pydoc_data.topics import topics

    if not path.is_file():
        paragraphs = (_prose(part) for name in sorted(topics) for part in topics[name].split("\n\n"))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "\n".join(each for each in paragraphs if each).encode() + b"\n")
    return path


def _prose(paragraph: str) -> str:
    """Return a paragraph on one line, without the rules and frames of headings and tables."""
    lines = (line.strip() for line in paragraph.splitlines())
    kept = (line for line in lines if line and not line.startswith(("|", "+--", "+==")) and not _RULE.fullmatch(line))
    return re.sub(r"\s+", " ", " ".join(kept))
