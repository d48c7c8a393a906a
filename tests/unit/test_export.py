"""Exported files do what the network does on real images; one that does not is never put in place."""

import copy
import errno
import json
import sys
from pathlib import Path
from typing import Any, cast

import onnx
import onnxruntime
import pytest
import torch
from factories import (
    CLASS_IDS,
    SIZE,
    classifier_card,
    classifier_files,
    write_image_dataset,
)
from samples import SHAPES, draw_shape
from torch import Tensor, nn
from torch.export import ExportedProgram

from tandem.checkpoints.files import WEIGHTS_FILE, write_checkpoint
from tandem.checkpoints.tensors import build_network
from tandem.errors import (
    CheckpointCorrupt,
    Conflict,
    DatasetNotFound,
    ExportFailed,
    InvalidImage,
    InvalidRequest,
    TandemError,
    Unavailable,
)
from tandem.export.check import TOLERANCE, check
from tandem.export.process import run_export
from tandem.export.programs import FORMATS, Format, trace, write_onnx
from tandem.export.request import ExportRequest, FormatName, check_packages, partial_file
from tandem.export.run import export_model, load_images
from tandem.export.sources import dataset_images, given_images
from tandem.volume import Volume

NAMES: tuple[FormatName, ...] = ("onnx", "torch-export")


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, ...]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{number:02}.png" for number in range(9)]
    for number, path in enumerate(paths):
        draw_shape(SHAPES[number % 3], number, 48).save(path)
    return tuple(paths)


def request(checkpoint: Path, output: Path, images: tuple[Path, ...], **changes: Any) -> ExportRequest:
    values: dict[str, Any] = {
        "checkpoint": checkpoint,
        "digest": None,
        "label": "shapes:1",
        "format": "torch-export" if output.suffix == ".pt2" else "onnx",
        "output": output,
        "images": images,
        "batch_size": 4,
    }
    return ExportRequest(**values | changes)


@pytest.fixture
def small(tmp_path: Path, pictures: tuple[Path, ...]) -> ExportRequest:
    """A request that is served in two seconds."""
    checkpoint = tmp_path / "step-00000001"
    write_checkpoint(checkpoint, classifier_files(classifier_card("squeezenet1_1")))
    out = tmp_path / "out"
    out.mkdir()
    return request(checkpoint, out / "model.pt2", pictures)


def left(asked: ExportRequest) -> list[str]:
    return sorted(path.name for path in asked.output.parent.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_report(name: FormatName, small: ExportRequest) -> None:
    asked = small.model_copy(update={"format": name})
    report = export_model(asked)
    assert 0 <= report.relative_difference <= TOLERANCE
    assert (report.num_images, report.batch_sizes) == (9, (1, 4))
    assert report.file_bytes == asked.output.stat().st_size
    assert report.opset == (20 if name == "onnx" else None)
    assert left(asked) == ["model.pt2"]


def test_what_stands_in_an_onnx_file(small: ExportRequest) -> None:
    output = small.output.with_suffix(".onnx")
    export_model(small.model_copy(update={"output": output, "format": "onnx"}))
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape, images.type) == ("images", ["batch", 3, SIZE, SIZE], "tensor(float)")
    assert (logits.name, logits.shape) == ("logits", ["batch", len(CLASS_IDS)])
    says = session.get_modelmeta().custom_metadata_map
    assert (says["model"], says["run_id"], says["opset"]) == ("shapes:1", "run-a", "20")
    assert [each["id"] for each in json.loads(says["classes"])] == list(CLASS_IDS)
    assert json.loads(says["preprocessing"])["mean"] == [0.5, 0.5, 0.5]
    assert onnx.load(output).opset_import[0].version == 20


def test_what_stands_in_a_torch_export_file(small: ExportRequest) -> None:
    export_model(small)
    extra = {"tandem.json": ""}
    program = torch.export.load(small.output, extra_files=extra)
    says = json.loads(extra["tandem.json"])
    assert (says["model"], says["run_id"], says["input"]["name"]) == ("shapes:1", "run-a", "images")
    assert [each["words"] for each in says["classes"]][:2] == ["thing 00", "thing 01"]
    assert program.module()(torch.zeros(3, 3, SIZE, SIZE)).shape == (3, len(CLASS_IDS))


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_a_path_of_this_machine(name: FormatName, small: ExportRequest) -> None:
    export_model(small.model_copy(update={"format": name}))
    data = small.output.read_bytes()
    assert str(Path(torch.__file__).parent.parent).encode() not in data
    assert b"stack_trace" not in data


def rounded(program: ExportedProgram, document: dict[str, Any], path: Path) -> None:
    """Write the network as it would be with float16 weights: the smallest mistake that the check must find."""
    # A copy: the program's tensors are those of the network that it is compared with.
    network = copy.deepcopy(program.module())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.half().float())
    FORMATS["torch-export"].write(trace_of(network), document, path)


def trace_of(module: nn.Module) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(module, (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=({0: batch},))


def another(_program: ExportedProgram, document: dict[str, Any], path: Path) -> None:
    torch.manual_seed(99)
    FORMATS["torch-export"].write(trace(build_network(classifier_card()).eval(), SIZE), document, path)


def cut_short(program: ExportedProgram, document: dict[str, Any], path: Path) -> None:
    FORMATS["torch-export"].write(program, document, path)
    path.write_bytes(path.read_bytes()[:1000])


def no_room(_program: ExportedProgram, _document: dict[str, Any], path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (another, "the exported file is not the network"),
        (cut_short, "can't be loaded"),
        (no_room, "can't write .*: No space left on device"),
    ],
)
def test_a_wrong_file_leaves_nothing(write: Any, line: str, small: ExportRequest) -> None:
    with pytest.raises(ExportFailed, match=line):
        export_model(small, Format(write, FORMATS["torch-export"].load))
    assert left(small) == []


def test_weights_rounded_to_float16_are_found(small: ExportRequest) -> None:
    small.output.write_bytes(b"what was there before")
    asked = small.model_copy(update={"force": True})
    with pytest.raises(ExportFailed, match=r"logits differ by up to .* of their scale \(allowed: 1e-04\)"):
        export_model(asked, Format(rounded, FORMATS["torch-export"].load))
    assert left(small) == ["model.pt2"]
    assert small.output.read_bytes() == b"what was there before"


def test_an_altered_checkpoint_is_not_exported(small: ExportRequest) -> None:
    weights = small.checkpoint / WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="altered"):
        export_model(small)
    assert left(small) == []


def test_a_file_that_appears_meanwhile_is_kept(small: ExportRequest) -> None:
    def write(program: ExportedProgram, document: dict[str, Any], path: Path) -> None:
        FORMATS["torch-export"].write(program, document, path)
        small.output.write_bytes(b"someone else's")

    with pytest.raises(Conflict, match="--force"):
        export_model(small, Format(write, FORMATS["torch-export"].load))
    assert small.output.read_bytes() == b"someone else's"
    assert left(small) == ["model.pt2"]


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class FixedBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(2, 3, -1).mean(2)


class Bessel(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = torch.special.bessel_j0(images).mean((2, 3))
        return logits


@pytest.mark.parametrize("network", [Branching(), FixedBatch()])
def test_what_torch_export_cannot_express(network: nn.Module) -> None:
    with pytest.raises(ExportFailed, match="this network can't be exported: ") as caught:
        trace(network.eval(), 8)
    assert "\n" not in str(caught.value)


def test_an_operator_that_onnx_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match="ONNX can't express this network: ") as caught:
        write_onnx(trace(Bessel().eval(), 8), {}, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_more_weights_than_an_onnx_file_holds(tmp_path: Path) -> None:
    class Enormous:
        def __init__(self) -> None:
            # 40 GB that take no memory.
            self.state_dict = {"weight": torch.empty(10**10, device="meta")}

    with pytest.raises(ExportFailed, match="--format torch-export"):
        write_onnx(cast(ExportedProgram, Enormous()), {}, tmp_path / "m.onnx")


# The images are their own logits: what the check does with them is seen without a network.
def same(logits: Tensor) -> Tensor:
    return logits


LOGITS = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]])


def test_agreement() -> None:
    found = check(same, lambda logits: logits + 2e-5, 2 * LOGITS, 2)
    assert found.max_difference == pytest.approx(2e-5, rel=0.01)
    assert found.relative_difference == pytest.approx(1e-5, rel=0.01)
    assert (found.num_images, found.batch_sizes, found.num_ties) == (3, (1, 2), 0)


def test_one_image_is_checked_in_a_batch_too() -> None:
    sizes: list[int] = []

    def exported(logits: Tensor) -> Tensor:
        sizes.append(len(logits))
        return logits

    assert check(same, exported, LOGITS[:1], 4).batch_sizes == (1, 4)
    assert sizes == [1, 4]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (lambda logits: logits + 2e-4, "logits differ by up to 0.0002"),
        (lambda logits: logits + (2e-4 if len(logits) > 1 else 0), "logits differ"),
        (lambda logits: logits + (2e-4 if len(logits) == 1 else 0), "logits differ"),
        (lambda logits: logits * torch.nan, "the exported file's logits are not finite"),
        (lambda logits: logits[:, :2], r"its logits have the shape \(1, 2\), not \(1, 3\)"),
    ],
)
def test_disagreement(wrong: Any, line: str) -> None:
    with pytest.raises(ExportFailed, match=line):
        check(same, wrong, LOGITS, 2)


def test_another_best_class_within_the_tolerance() -> None:
    near = torch.tensor([[1.0, 1.0 - 8e-5]])
    with pytest.raises(ExportFailed, match="1 of 1 images get another best class at batch size 1"):
        check(same, lambda logits: logits.flip(1), near, 1)


def test_a_tie_may_fall_either_way() -> None:
    near = torch.tensor([[1.0, 1.0 - 1e-6]])
    assert check(same, lambda logits: logits.flip(1), near, 1).num_ties >= 1


@pytest.mark.parametrize(("value", "line"), [(0.0, "zero for every image"), (float("nan"), "the network's logits")])
def test_a_network_that_says_nothing(value: float, line: str) -> None:
    with pytest.raises(ExportFailed, match=line):
        check(same, same, torch.full((2, 3), value), 2)


def test_images_of_a_dataset(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    write_image_dataset(volume, "shapes", 20)
    chosen = dataset_images(volume, "shapes", 5)
    assert len(chosen) == 5
    assert all(path.is_file() for path in chosen)
    assert len(dataset_images(volume, "shapes", 100)) == 20


def test_no_images_to_check_on(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    with pytest.raises(DatasetNotFound, match="--images-from"):
        dataset_images(volume, "shapes", 5)
    write_image_dataset(volume, "shapes", 3)
    (volume.dataset("shapes") / "index" / "val.jsonl").write_text("")
    with pytest.raises(DatasetNotFound, match="empty val split"):
        dataset_images(volume, "shapes", 5)
    (volume.dataset("shapes") / "index" / "val.jsonl").unlink()
    with pytest.raises(DatasetNotFound, match="no split 'val'"):
        dataset_images(volume, "shapes", 5)


def test_given_images(tmp_path: Path, pictures: tuple[Path, ...]) -> None:
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    assert given_images([tmp_path / "pictures"], 100) == pictures
    assert given_images([pictures[3], tmp_path / "pictures"], 2) == (pictures[3], pictures[0], pictures[4])
    with pytest.raises(InvalidRequest, match="is no file"):
        given_images([tmp_path / "absent.png"], 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match="holds no images"):
        given_images([tmp_path / "empty"], 1)


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InvalidImage, match=r"bad\.png: not an image"):
        load_images((tmp_path / "bad.png",), classifier_card().preprocessing)


def test_a_missing_package_is_named() -> None:
    def find(name: str) -> object | None:
        return None if name == "onnxscript" else name

    with pytest.raises(Unavailable, match="needs the package onnxscript, which is not installed"):
        check_packages("onnx", find)
    check_packages("torch-export", find)
    check_packages("onnx")


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed; the machine may be out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("raise RuntimeError('out of cheese')", "failed: RuntimeError: out of cheese"),
        ("raise SystemExit(3)", "ended with 3 and said nothing"),
        ('print(\'{"error": "one line"}\')', "^one line$"),
    ],
)
def test_a_process_that_gives_no_report(program: str, line: str, tmp_path: Path) -> None:
    asked = request(tmp_path, tmp_path / "m.onnx", ())
    with pytest.raises(TandemError, match=line):
        run_export(asked, (sys.executable, "-c", program))


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    asked = request(tmp_path, tmp_path / "m.onnx", ())
    # The name that the process writes under while it works.
    assert partial_file(asked.output, 7) == tmp_path / ".m.onnx.7.onnx"
    program = (
        "import os, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, f'.m.onnx.{{os.getpid()}}.onnx').write_bytes(b'half')\n"
        "os.kill(os.getpid(), 9)"
    )
    with pytest.raises(ExportFailed):
        run_export(asked, (sys.executable, "-c", program))
    assert list(tmp_path.iterdir()) == []
