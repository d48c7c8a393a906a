"""Made-up sources for the tests of the prepare commands, and small things to look at what came out."""

import hashlib
import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01443537", "n01629819", "n02132136")


class Recorder:
    """A Progress that remembers; with `interrupt_at` it is a person who presses Ctrl-C after so many units."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.stages: list[str] = []
        self.units = 0
        self.interrupt_at = interrupt_at

    def start(self, description: str, total: int | None) -> None:
        self.stages.append(description)
        self.units = 0

    def advance(self, units: int = 1) -> None:
        self.units += units
        if self.interrupt_at is not None and self.units >= self.interrupt_at:
            raise KeyboardInterrupt


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A smooth picture with something of its own; `size` is (width, height)."""
    across = np.linspace(0, 200, size[0])[None, :, None]
    down = np.linspace(0, 50, size[1])[:, None, None]
    pixels = (across + down + np.array([seed * 7 % 40, 0, 5])).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    output = io.BytesIO()
    image.save(output, form, **options)
    return output.getvalue()


def deep_grey() -> Image.Image:
    """A grey picture of 16 bits."""
    return Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16))


def deep_colour_png() -> bytes:
    """A 4×4 PNG of three channels of 16 bits, which PIL reads and does not write."""

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(4))
    header = part(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def tiny_imagenet_files(wnids: tuple[str, ...] = WNIDS, num_train: int = 4, num_val: int = 2) -> dict[str, bytes]:
    """The official layout in small; the second train image and the first val image of each class are one-channel."""
    files: dict[str, bytes] = {"test/images/test_0.JPEG": encode(picture())}
    annotations = []
    for label, wnid in enumerate(wnids):
        for i in range(num_train):
            name = f"train/{wnid}/images/{wnid}_{i}.JPEG"
            files[name] = encode(picture(label * 10 + i, "L" if i == 1 else "RGB"))
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"a.JPEG\t0\t0\t1\t1\n"
        for i in range(num_val):
            # Numbered across the classes, so that the folder does not lie in class order.
            file = f"val_{i * len(wnids) + label}.JPEG"
            files[f"val/images/{file}"] = encode(picture(50 + label + i, "L" if i == 0 else "RGB"))
            annotations.append(f"{file}\t{wnid}\t0\t0\t7\t7\n")
    files["val/val_annotations.txt"] = "".join(annotations).encode()
    files["wnids.txt"] = "".join(f"{wnid}\n" for wnid in reversed(wnids)).encode()
    files["words.txt"] = "".join(f"{wnid}\tthing {wnid}, other word\n" for wnid in (*wnids, "n99999999")).encode()
    return files


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: Mapping[str, bytes], top: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"{top}{name}", data)
    return path


def tree_digest(root: Path) -> str:
    """A SHA-256 over names, contents and times of change below `root`."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path.relative_to(root)} {path.stat().st_mtime_ns}".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def visible(datasets: Path) -> list[str]:
    """Everything in the folder of datasets, hidden or not."""
    return sorted(path.name for path in datasets.iterdir()) if datasets.exists() else []
