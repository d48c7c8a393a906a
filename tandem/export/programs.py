"""A network as a program of torch.export, and the two kinds of file that are made of it and run."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tandem.errors import ExportFailed, TandemError
from tandem.export.check import Predict
from tandem.export.metadata import EXTRA_FILE, INPUT, OUTPUT, as_texts
from tandem.export.request import FormatName

if TYPE_CHECKING:
    from onnx import ModelProto

# Named rather than left to torch, so that a file does not change with its version; onnxruntime reads it since 1.17.
OPSET = 20
# A protobuf message holds no more.
_ONNX_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Format:
    """A kind of file: how a program and the document that describes it are written, and how the file is run."""

    write: Callable[[ExportedProgram, dict[str, Any], Path], None]
    load: Callable[[Path], Predict]
    opset: int | None = None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever torch, onnx and onnxruntime raise (their errors share no base) into ExportFailed of one line."""
    try:
        yield
    except (TandemError, OSError):
        raise
    except Exception as error:
        lines = (line.strip() for line in str(error).splitlines())
        reason = next((line for line in lines if line), "")
        raise ExportFailed(f"{what}: {type(error).__name__}: {reason[:300]}") from error


def trace(network: nn.Module, image_size: int) -> ExportedProgram:
    """Return `network`, in eval mode on the CPU, as a program for images (B, 3, S, S) of any batch size.

    Raises ExportFailed where it has an operator or a branch that torch.export can't express.
    """
    example = torch.zeros(2, 3, image_size, image_size)
    with explained("this network can't be exported"), torch.no_grad():
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},), strict=False)
    for node in program.graph.nodes:
        # Where each operator was called, with the paths of this machine.
        node.meta.pop("stack_trace", None)
    return program


def write_torch_export(program: ExportedProgram, document: dict[str, Any], path: Path) -> None:
    """Write `program` to `path`, with `document` as the extra file `tandem.json`."""
    extra = {EXTRA_FILE: json.dumps(document, ensure_ascii=False)}
    with explained("torch.export can't save this network"), open(path, "wb") as file:
        torch.export.save(program, file, extra_files=extra)


def load_torch_export(path: Path) -> Predict:
    """Return the program in the file `path` as a function."""
    with explained(f"{path.name} can't be loaded"):
        module = torch.export.load(path).module()

    def predict(images: Tensor) -> Tensor:
        with explained(f"the exported file does not run at batch size {len(images)}"), torch.inference_mode():
            logits: Tensor = module(images)
        return logits

    return predict


def write_onnx(program: ExportedProgram, document: dict[str, Any], path: Path) -> None:
    """Write `program` to `path` as one ONNX file, with `document` and the opset among its metadata.

    Raises ExportFailed where an operator has no ONNX form, or the weights are over the 2 GiB of an ONNX file.
    """
    check_onnx_size(program.state_dict.values())
    with explained("ONNX can't express this network"):
        model = to_onnx(program, [INPUT], [OUTPUT])
        data = described(model, document, {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}).SerializeToString()
    path.write_bytes(data)


def check_onnx_size(weights: Iterable[Tensor]) -> None:
    """Raise ExportFailed where `weights` are more than an ONNX file holds."""
    num_bytes = sum(tensor.nbytes for tensor in weights)
    if num_bytes > _ONNX_BYTES:
        raise ExportFailed(f"an ONNX file holds 2 GiB; this network has {num_bytes:,} bytes: use --format torch-export")


def to_onnx(program: ExportedProgram, inputs: list[str], outputs: list[str]) -> "ModelProto":
    """Return `program` in ONNX, its inputs and outputs by these names."""
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=inputs,
        output_names=outputs,
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    return exported.model_proto


def described(model: "ModelProto", document: dict[str, Any], axes: dict[str, dict[int, str]]) -> "ModelProto":
    """Return `model` with the document as its metadata, and without the exporter's notes on this machine's sources.

    `axes` are the names of the open dimensions of each input and output.
    """
    from onnx import checker, helper

    graph = model.graph
    parts: tuple[Any, ...] = (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer)
    for part in parts:
        del part.metadata_props[:]
    # Shapes in between are for readers; the exporter calls the batch size by a number of its own ("s77").
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for axis, name in axes.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    helper.set_model_props(model, {**as_texts(document), "opset": str(OPSET)})
    checker.check_model(model)
    return model


def load_onnx(path: Path) -> Predict:
    """Return the ONNX file `path` as a function, run by onnxruntime on the CPU."""
    session = onnx_session(path)

    def predict(images: Tensor) -> Tensor:
        with explained(f"the exported file does not run at batch size {len(images)}"):
            (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return predict


def onnx_session(path: Path) -> Any:
    """Return an onnxruntime session of the file `path` on the CPU; raise ExportFailed where it can't be loaded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with explained(f"onnxruntime can't load {path.name}"):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


FORMATS: dict[FormatName, Format] = {
    "onnx": Format(write_onnx, load_onnx, OPSET),
    "torch-export": Format(write_torch_export, load_torch_export),
}
