"""What is to be exported, and what came of it. Free of torch."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tandem.errors import Conflict, InvalidRequest, Unavailable

FormatName = Literal["onnx", "torch-export"]
SUFFIXES: dict[FormatName, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
_PACKAGES: dict[FormatName, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch-export": ()}


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ExportRequest(_Closed):
    """Which checkpoint goes into which file, and the image files to check it on.

    `digest` is the SHA-256 of the checkpoint's manifest where the registry knows it; `label` is how a person names the
    model; `output` is absolute. Beside one by one, the images are run in batches of `batch_size`. A language model is
    checked on random tokens, with no images.
    """

    checkpoint: Path
    digest: str | None
    label: str
    format: FormatName
    output: Path
    images: tuple[Path, ...]
    batch_size: int
    force: bool = False


class ExportReport(_Closed):
    """What was written, and how near it is to the network.

    `max_difference` is the largest absolute difference of two logits; `relative_difference` is that over the largest
    absolute logit of the network, and is at most `tolerance`. `num_ties` images have a second class that is as good as
    the best to float rounding; for all others the best class is the same. `opset` is None but for ONNX.
    """

    model: str
    format: FormatName
    file: str
    file_bytes: int
    opset: int | None
    num_images: int
    batch_sizes: tuple[int, ...]
    max_difference: float
    relative_difference: float
    tolerance: float
    num_ties: int


class LanguageExportReport(_Closed):
    """What was written of a language model, and how near it is to the network.

    Checked on texts of `num_tokens` random tokens, `pieces` of them at a time with the state carried on, at
    `batch_sizes`. `dynamic` are the sizes that are open in the file: "batch", and "time" where a call takes any number
    of tokens (else one). `num_ties` places have a second word as likely as the first to float rounding; for all others
    the likeliest word is the same. The other fields are those of ExportReport.
    """

    model: str
    format: FormatName
    file: str
    file_bytes: int
    opset: int | None
    dynamic: tuple[str, ...]
    num_tokens: int
    pieces: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    max_difference: float
    relative_difference: float
    tolerance: float
    num_ties: int


def check_packages(format_name: FormatName, find: Callable[[str], object | None] = find_spec) -> None:
    """Raise Unavailable where a package that `format_name` needs is not installed."""
    missing = [name for name in _PACKAGES[format_name] if find(name) is None]
    if missing:
        raise Unavailable(
            f"--format {format_name} needs the package {missing[0]}, which is not installed; "
            f"run 'pip install {' '.join(missing)}', or use --format torch-export"
        )


def check_output(output: Path, force: bool) -> None:
    """Raise Conflict where `output` is there already (and not `force`), InvalidRequest where it can't be a file."""
    if output.is_dir():
        raise InvalidRequest(f"{output} is a directory; give --output the name of a file", field="output")
    if not output.parent.is_dir():
        raise InvalidRequest(f"{output.parent} is no directory; make it first, or give another --output", "output")
    if output.exists() and not force:
        raise Conflict(f"{output} is there already; --force replaces it, --output names another")


def partial_file(output: Path, pid: int) -> Path:
    """Return the name beside `output` under which process `pid` writes, until the file has passed its check."""
    return output.with_name(f".{output.name}.{pid}{output.suffix}")
