"""Exported language models do what the networks do, from the first token on and with their state carried."""

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from factories import MODELS, language_card, language_files, vocabulary
from torch import Tensor, nn

from tandem.checkpoints.files import write_checkpoint
from tandem.checkpoints.tensors import load_checkpoint
from tandem.errors import Conflict, ExportFailed
from tandem.export.check import TOLERANCE
from tandem.export.language_check import check_language_model
from tandem.export.language_formats import LANGUAGE_FORMATS, LanguageFormat
from tandem.export.language_programs import has_dynamic_time, state_of
from tandem.export.request import SUFFIXES, ExportRequest, FormatName
from tandem.export.run import export_any, export_language_model
from tandem.models.awd_lstm import AwdLanguageModel
from tandem.models.recurrent import RecurrentLanguageModel

WORDS = vocabulary()
LENGTH = 40


def request_for(folder: Path, model: str, form: FormatName = "onnx", **changes: Any) -> ExportRequest:
    checkpoint = folder / "step-00000001"
    write_checkpoint(checkpoint, language_files(language_card(model, len(WORDS), **changes), WORDS))
    (folder / "out").mkdir()
    return ExportRequest(
        checkpoint=checkpoint,
        digest=None,
        label="words:1",
        format=form,
        output=folder / "out" / f"m{SUFFIXES[form]}",
        images=(),
        batch_size=2,
    )


def network_of(asked: ExportRequest) -> nn.Module:
    return load_checkpoint(asked.checkpoint).network


def in_pieces(session: Any, token_ids: Tensor, piece: int) -> Tensor:
    """Run the ONNX file as anybody would, by the names and shapes that it tells."""
    _, *state = session.get_inputs()
    kinds = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64}
    sizes = {"batch": len(token_ids)}
    carried = {
        each.name: torch.zeros([sizes.get(size, size) for size in each.shape], dtype=kinds[each.type]).numpy()
        for each in state
    }
    rows = []
    for tokens in token_ids.split(piece, dim=1):  # type: ignore[no-untyped-call]
        answers = session.run(None, {"token_ids": tokens.numpy(), **carried})
        named = dict(zip([each.name for each in session.get_outputs()], answers, strict=True))
        rows.append(torch.from_numpy(named["logits"]))
        carried = {name: named[f"{name}_after"] for name in carried}
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"num_layers": 1}])
@pytest.mark.parametrize("model", MODELS)
def test_onnx_gives_the_logits_of_the_network(model: str, changes: dict[str, Any], tmp_path: Path) -> None:
    asked = request_for(tmp_path, model, **changes)
    report = export_language_model(asked)
    assert report.dynamic == ("batch", "time")
    assert report.relative_difference <= TOLERANCE
    assert (report.file_bytes, report.opset) == (asked.output.stat().st_size, 20)
    session = onnxruntime.InferenceSession(str(asked.output), providers=["CPUExecutionProvider"])
    # Five times the Transformer's window.
    token_ids = torch.randint(len(WORDS), (2, LENGTH), generator=torch.Generator().manual_seed(9))
    expected = network_of(asked)(token_ids, None)[0]
    assert expected.std() > 0.01
    rounding = 2e-5 * float(expected.abs().max())
    for piece in (1, 9, LENGTH):
        torch.testing.assert_close(in_pieces(session, token_ids, piece), expected, atol=rounding, rtol=0)
    assert sorted(path.name for path in asked.output.parent.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("model", MODELS)
def test_torch_export_gives_the_logits_of_the_network(model: str, tmp_path: Path) -> None:
    asked = request_for(tmp_path, model, "torch-export")
    report = export_any(asked)
    # torch.export unrolls recurrent layers in time: their programs take a token at a time.
    expected_dynamic = ("batch", "time") if model == "Transformer" else ("batch",)
    assert report.model_dump()["dynamic"] == expected_dynamic
    assert report.model_dump()["pieces"] == ((1, 7, 72) if model == "Transformer" else (1,))
    assert report.relative_difference <= TOLERANCE
    extra = {"tandem.json": ""}
    program = torch.export.load(asked.output, extra_files=extra).module()
    says = json.loads(extra["tandem.json"])
    assert says["vocabulary"]["tokens"] == list(WORDS.tokens)
    assert says["inputs"][0]["name"] == "token_ids"
    state = [each.zeros(3) for each in state_of(network_of(asked))]
    assert program(torch.zeros(3, 1, dtype=torch.long), *state)[0].shape == (3, 1, len(WORDS))


def test_what_stands_in_an_onnx_file(tmp_path: Path) -> None:
    asked = request_for(tmp_path, "LSTM")
    export_any(asked)
    session = onnxruntime.InferenceSession(str(asked.output), providers=["CPUExecutionProvider"])
    assert [(each.name, each.shape) for each in session.get_inputs()] == [
        ("token_ids", ["batch", "time"]),
        ("h", [2, "batch", 16]),
        ("c", [2, "batch", 16]),
    ]
    assert [each.name for each in session.get_outputs()] == ["logits", "h_after", "c_after"]
    says = session.get_modelmeta().custom_metadata_map
    assert (says["model"], says["run_id"], says["opset"]) == ("words:1", "run-l", "20")
    assert json.loads(says["vocabulary"]) == {"tokenizer": "words", "tokens": list(WORDS.tokens)}
    onnx.checker.check_model(onnx.load(asked.output), full_check=True)


@pytest.mark.parametrize("form", SUFFIXES)
def test_no_file_names_a_path_of_this_machine(form: FormatName, tmp_path: Path) -> None:
    asked = request_for(tmp_path, "Transformer", form)
    export_any(asked)
    data = asked.output.read_bytes()
    assert str(Path(torch.__file__).parent.parent).encode() not in data
    assert b"stack_trace" not in data


def swapped(network: nn.Module, document: dict[str, Any], path: Path) -> None:
    """Write the network with the gates of its first layer in another order."""
    assert isinstance(network, RecurrentLanguageModel | AwdLanguageModel)
    other = copied(network)
    with torch.no_grad():
        weight = other.layers.weight_hh_l0
        weight.copy_(weight.roll(16, 0))
    LANGUAGE_FORMATS["onnx"].write(other, document, path)


def copied(network: nn.Module) -> Any:
    return copy.deepcopy(network)


def rounded(network: nn.Module, document: dict[str, Any], path: Path) -> None:
    """Write the network as it would be with float16 weights."""
    other = copied(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.half().float())
    LANGUAGE_FORMATS["onnx"].write(other, document, path)


@pytest.mark.parametrize("write", [swapped, rounded])
def test_a_wrong_file_leaves_nothing(write: Any, tmp_path: Path) -> None:
    asked = request_for(tmp_path, "GRU")
    right = LANGUAGE_FORMATS["onnx"]
    with pytest.raises(ExportFailed, match="the exported file is not the network: at batch size 1"):
        export_language_model(asked, LanguageFormat(write, right.load, right.has_dynamic_time))
    assert list(asked.output.parent.iterdir()) == []


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    asked = request_for(tmp_path, "RNN_TANH")
    asked.output.write_bytes(b"before")
    with pytest.raises(Conflict, match="--force"):
        export_language_model(asked)
    assert asked.output.read_bytes() == b"before"
    export_language_model(asked.model_copy(update={"force": True}))
    assert asked.output.stat().st_size > 1000


@pytest.mark.parametrize("forgotten", [0, 1, 4])
def test_a_state_that_is_not_handed_on_is_found(forgotten: int, tmp_path: Path) -> None:
    network = network_of(request_for(tmp_path, "Transformer"))
    state = state_of(network)
    exported = LANGUAGE_FORMATS["torch-export"]
    exported.write(network, {}, tmp_path / "m.pt2")
    right = exported.load(tmp_path / "m.pt2", state)

    def step(token_ids: Tensor, before: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits, after = right(token_ids, before)
        after = list(after)
        after[forgotten] = before[forgotten]
        return logits, after

    assert check_language_model(network, right, state, len(WORDS), has_dynamic_time(network)).num_tokens == 72
    with pytest.raises(ExportFailed, match="1 tokens at a time, logits differ"):
        check_language_model(network, step, state, len(WORDS), has_dynamic_time(network))


@pytest.mark.parametrize(("value", "line"), [(0.0, "zero for every word"), (float("nan"), "not finite")])
def test_a_network_that_says_nothing(value: float, line: str, tmp_path: Path) -> None:
    network = network_of(request_for(tmp_path, "LSTM"))
    for parameter in network.parameters():
        parameter.fill_(value)
    with pytest.raises(ExportFailed, match=line):
        check_language_model(network, lambda *_: (torch.zeros(1), []), state_of(network), len(WORDS), True)
