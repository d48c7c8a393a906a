"""The predictions file, `predictions.jsonl`: what a classifier says of each image of a split.

The first line says who predicted what; then one line an image, in the order of the split:

    {"format": "tandem-predictions", "format_version": 1, "model": "tiny:3", …, "num_images": 9, "classes": […]}
    {"file": "val/n01443537/val_15.JPEG", "label": "n01443537", "top_k": [{"id": "n01443537", "probability": 0.83}, …]}

It is written whole or not at all, and read line by line.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tandem.comparison.results import Comparison, ComparisonSummary, ModelVersion, PairResult, ScoredClass, Timings
from tandem.data.manifest import ClassName
from tandem.errors import Conflict, InvalidRequest
from tandem.volume import replace_file, volume_errors

# What an evaluation run leaves in its directory.
PREDICTIONS_FILE = "predictions.jsonl"
EVALUATION_FILE = "evaluation.json"

FORMAT: Literal["tandem-predictions"] = "tandem-predictions"
FORMAT_VERSION: Literal[1] = 1
# Of a file that is something else, no more than this is read before it is refused.
_LONGEST_LINE = 16 * 2**20


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Header(_Closed):
    """The first line: the model by its label, `run_id` and `step` of its checkpoint, its classes, and the data."""

    format: Literal["tandem-predictions"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    model: str
    run_id: str
    step: int
    architecture: str
    precision: Literal["float32", "bfloat16"]
    dataset: str
    dataset_fingerprint: str
    split: str
    num_images: int = Field(ge=1)
    classes: tuple[ClassName, ...]


class ScoredId(_Closed):
    """A class by its id, with its probability, 0 to 1."""

    id: str
    probability: float


class Prediction(_Closed):
    """One image: `file` in the dataset, the id of its true class, and the most probable classes, best first."""

    file: str
    label: str
    top_k: tuple[ScoredId, ...] = Field(min_length=1)


def write_predictions(path: Path, header: Header, predictions: Iterable[Prediction]) -> None:
    """Write a predictions file atomically; raise VolumeUnavailable where that fails."""
    lines = (each.model_dump_json() for each in itertools.chain([header], predictions))
    with volume_errors(path):
        replace_file(path, "".join(f"{line}\n" for line in lines).encode())


def read_predictions(path: Path) -> tuple[Header, Iterator[Prediction]]:
    """Return the header of a predictions file, and its images as they are read.

    Raises InvalidRequest, now or while the images are read: no such file, another format or version, cut short.
    """
    try:
        with open(path, "rb") as file:
            header = _parse_header(path, file.readline(_LONGEST_LINE))
    except OSError as error:
        raise InvalidRequest(f"can't read {path}: {error.strerror}; 'tandem evaluate' writes predictions") from error
    return header, _rows(path, header.num_images)


def _parse_header(path: Path, line: bytes) -> Header:
    try:
        found = json.loads(line)
        is_ours = isinstance(found, dict) and found.get("format") == FORMAT
    except (ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        raise InvalidRequest(f"{path} is no predictions file; 'tandem evaluate' writes one")
    if found.get("format_version") != FORMAT_VERSION:
        raise InvalidRequest(
            f"{path} is a predictions file of version {found.get('format_version')}; this Tandem reads version "
            f"{FORMAT_VERSION}: run 'tandem evaluate' again"
        )
    try:
        return Header.model_validate_json(line)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InvalidRequest(f"{path} has a damaged first line ({where}: {error.errors()[0]['msg']})") from error


def _rows(path: Path, num_images: int) -> Iterator[Prediction]:
    with open(path, "rb") as file:
        file.readline(_LONGEST_LINE)
        for number in range(1, num_images + 1):
            line = file.readline(_LONGEST_LINE)
            if not line.endswith(b"\n"):
                raise InvalidRequest(f"{path} is cut short, at image {number} of {num_images:,}: evaluate again")
            yield _parse_row(path, line, number)
        if file.readline(1):
            raise InvalidRequest(f"{path} has more images than the {num_images:,} that its first line counts")


def _parse_row(path: Path, line: bytes, number: int) -> Prediction:
    try:
        return Prediction.model_validate_json(line)
    except ValidationError as error:
        raise InvalidRequest(f"{path} is damaged at image {number} (line {number + 1}): evaluate again") from error


def compare_predictions(path_a: Path, path_b: Path, top_k: int = 5) -> Comparison:
    """Return the comparison of two predictions files, with the images that differ, and `top_k` classes of each.

    Classes are matched by their ids. Raises Conflict where the files are not of the same images.
    """
    # SciPy, which takes a second to import; who writes such a file needs none.
    from tandem.comparison.weighing import weigh_pairs

    header_a, rows_a = read_predictions(path_a)
    header_b, rows_b = read_predictions(path_b)
    _check_same_data(header_a, header_b)
    classes_a, classes_b = _by_id(header_a), _by_id(header_b)
    pairs = list[PairResult]()
    for a, b in zip(rows_a, rows_b, strict=True):
        if (a.file, a.label) != (b.file, b.label):
            raise Conflict(f"the files are not of the same images: {path_a} has {a.file} where {path_b} has {b.file}")
        # All that the files have: accuracy@5 needs five.
        scored = (_scored(a, classes_a), _scored(b, classes_b))
        pairs.append(PairResult(a.file, a.label, *scored, agree=scored[0][0].id == scored[1][0].id))
    evidence = replace(
        weigh_pairs(pairs, {*classes_a, *classes_b}, has_divergence=False),
        only_in_a=tuple(each for each in classes_a if each not in classes_b),
        only_in_b=tuple(each for each in classes_b if each not in classes_a),
    )
    differing = tuple(replace(pair, a=pair.a[:top_k], b=pair.b[:top_k]) for pair in pairs if not pair.agree)
    summary = ComparisonSummary(
        _version(header_a),
        _version(header_b),
        header_a.num_images,
        len(differing),
        num_errors=0,
        labelled=evidence.labelled.table if evidence.labelled else None,
        evidence=evidence,
    )
    return Comparison(differing, summary, Timings())


def _check_same_data(a: Header, b: Header) -> None:
    # A dataset may have another name on another volume; its fingerprint says whether it is the same.
    for same, what, of_a, of_b in (
        (a.dataset_fingerprint == b.dataset_fingerprint, "datasets", _data(a), _data(b)),
        (a.split == b.split, "splits", a.split, b.split),
        (a.num_images == b.num_images, "numbers of images", f"{a.num_images:,}", f"{b.num_images:,}"),
    ):
        if not same:
            raise Conflict(f"the predictions are for other {what}: {of_a} and {of_b}; evaluate both models on the same")


def _data(header: Header) -> str:
    return f"{header.dataset} ({header.dataset_fingerprint[:12]})"


def _by_id(header: Header) -> dict[str, tuple[int, ClassName]]:
    return {each.id: (index, each) for index, each in enumerate(header.classes)}


def _scored(prediction: Prediction, classes: dict[str, tuple[int, ClassName]]) -> tuple[ScoredClass, ...]:
    found = []
    for each in prediction.top_k:
        if each.id not in classes:
            raise InvalidRequest(
                f"{prediction.file} is predicted to be {each.id!r}, which the first line does not list"
            )
        index, name = classes[each.id]
        found.append(ScoredClass(index, each.id, name.words, each.probability))
    return tuple(found)


def _version(header: Header) -> ModelVersion:
    name, _, version = header.model.rpartition(":")
    # A checkpoint that is no version is named run:<run_id>/<step>.
    is_version = name != "run" and version.isdecimal()
    return ModelVersion(
        name=name if is_version else "",
        version=int(version) if is_version else 0,
        run_id=header.run_id,
        step=header.step,
        architecture=header.architecture,
        dtype=header.precision,
    )
