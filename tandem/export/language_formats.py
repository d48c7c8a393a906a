"""The two kinds of file that are made of a language model, and how each is run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tandem.export.language_check import Step
from tandem.export.language_programs import (
    LOGITS,
    TOKEN_IDS,
    StateTensor,
    has_dynamic_time,
    state_of,
    trace_language_model,
)
from tandem.export.metadata import EXTRA_FILE, after
from tandem.export.programs import OPSET, check_onnx_size, described, explained, onnx_session, to_onnx
from tandem.export.recurrent_onnx import recurrent_model
from tandem.export.request import FormatName
from tandem.models.awd_lstm import AwdLanguageModel
from tandem.models.recurrent import RecurrentLanguageModel


@dataclass(frozen=True)
class LanguageFormat:
    """A kind of file: how a network and the document that describes it are written, and how the file is run."""

    write: Callable[[nn.Module, dict[str, Any], Path], None]
    load: Callable[[Path, tuple[StateTensor, ...]], Step]
    has_dynamic_time: Callable[[nn.Module], bool]
    opset: int | None = None


def write_onnx(network: nn.Module, document: dict[str, Any], path: Path) -> None:
    """Write `network` to `path` as one ONNX file; raise ExportFailed where it can't be."""
    check_onnx_size(network.parameters())
    state = state_of(network)
    with explained("ONNX can't express this network"):
        if isinstance(network, RecurrentLanguageModel | AwdLanguageModel):
            model = recurrent_model(network, OPSET)
        else:
            names = [each.name for each in state]
            program = trace_language_model(network)
            model = to_onnx(program, [TOKEN_IDS, *names], [LOGITS, *map(after, names)])
        axes = {TOKEN_IDS: {0: "batch", 1: "time"}, LOGITS: {0: "batch", 1: "time"}}
        for each in state:
            if -1 in each.shape:
                axes[each.name] = axes[after(each.name)] = {each.shape.index(-1): "batch"}
        data = described(model, document, axes).SerializeToString()
    path.write_bytes(data)


def load_onnx(path: Path, state: tuple[StateTensor, ...]) -> Step:
    """Return the ONNX file `path` as a function, run by onnxruntime on the CPU."""
    session = onnx_session(path)
    outputs = [LOGITS, *(after(each.name) for each in state)]

    def step(token_ids: Tensor, before: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        inputs = {each.name: tensor.numpy() for each, tensor in zip(state, before, strict=True)}
        with explained(f"the exported file does not run on {tuple(token_ids.shape)} tokens"):
            logits, *after_it = session.run(outputs, {TOKEN_IDS: token_ids.numpy(), **inputs})
        return torch.from_numpy(logits), [torch.from_numpy(each) for each in after_it]

    return step


def write_torch_export(network: nn.Module, document: dict[str, Any], path: Path) -> None:
    """Write `network` to `path` as a torch.export program, with `document` as the extra file `tandem.json`."""
    extra = {EXTRA_FILE: json.dumps(document, ensure_ascii=False)}
    with explained("torch.export can't save this network"), open(path, "wb") as file:
        torch.export.save(trace_language_model(network), file, extra_files=extra)


def load_torch_export(path: Path, state: tuple[StateTensor, ...]) -> Step:
    """Return the program in the file `path` as a function."""
    del state
    with explained(f"{path.name} can't be loaded"):
        module = torch.export.load(path).module()

    def step(token_ids: Tensor, before: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        what = f"the exported file does not run on {tuple(token_ids.shape)} tokens"
        with explained(what), torch.inference_mode():
            logits, *after_it = module(token_ids, *before)
        return logits, after_it

    return step


LANGUAGE_FORMATS: dict[FormatName, LanguageFormat] = {
    "onnx": LanguageFormat(write_onnx, load_onnx, lambda _: True, OPSET),
    "torch-export": LanguageFormat(write_torch_export, load_torch_export, has_dynamic_time),
}
