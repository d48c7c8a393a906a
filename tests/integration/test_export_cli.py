"""`tandem models export` and the table of `tandem models show`, as a person types them; every family of networks."""

import signal
import subprocess
import time
from pathlib import Path

import onnxruntime
import pytest
import torch
from factories import (
    SIZE,
    classifier_card,
    classifier_files,
    png,
    publish_classifier,
    publish_language_model,
    write_image_dataset,
)
from samples import SHAPES, draw_shape
from shell import Shell
from torch import nn

from tandem.checkpoints.files import NETWORK_FILE, WEIGHTS_FILE, step_directory, write_checkpoint
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.tensors import build_network, to_bytes
from tandem.export.check import TOLERANCE
from tandem.export.request import SUFFIXES, ExportRequest
from tandem.export.run import export_model, load_images
from tandem.models.layers import to_json
from tandem.models.structure import layer_table
from tandem.models.weights import bare_state
from tandem.volume import Volume

# Of those measured in docs/decisions/0007-export.md; ResNet-18 and SqueezeNet are exported by other tests.
FAMILIES = ("mobilenet_v3_small", "vit_b_16", "convnext_tiny")


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    volume = Volume(tmp_path / "home")
    publish_classifier(volume, "shapes", "run-a")
    write_image_dataset(volume, "shapes", 12)
    return volume


@pytest.fixture
def tandem(volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """The command in an empty directory, where it writes by default."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Shell(volume.home)


def here() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir())


def test_onnx(tandem: Shell) -> None:
    printed = tandem("models", "export", "shapes").stdout
    assert here() == ["shapes-1.onnx"]
    assert f"{Path.cwd() / 'shapes-1.onnx'}  (onnx, opset 20, " in printed
    assert "checked against shapes:1 on 12 images, at batch sizes 1 and 16" in printed
    assert "(allowed 1e-04); same best class for all" in printed
    session = onnxruntime.InferenceSession("shapes-1.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["model"] == "shapes:1"


def test_torch_export_of_a_run(tandem: Shell) -> None:
    report = tandem.json("models", "export", "run:run-a/1", "--format", "torch-export", "--images", "5")
    assert here() == ["run-a-step-1.pt2"]
    assert report["file"] == str(Path.cwd() / "run-a-step-1.pt2")
    assert (report["model"], report["opset"], report["num_images"]) == ("run:run-a/1", None, 5)
    assert 0 <= report["relative_difference"] <= report["tolerance"] == TOLERANCE
    with torch.inference_mode():
        assert torch.export.load("run-a-step-1.pt2").module()(torch.zeros(3, 3, SIZE, SIZE)).shape == (3, 5)


def test_given_images_and_an_output(tandem: Shell, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    output = tmp_path / "small.onnx"
    output.write_bytes(b"before")
    command = ("models", "export", "shapes:1", "--images-from", str(tmp_path / "a.png"), "--output", str(output))
    assert tandem.error(*command) == f"tandem: {output} is there already; --force replaces it, --output names another"
    assert output.read_bytes() == b"before"
    assert tandem.json(*command, "--force")["num_images"] == 1
    assert output.stat().st_size > 1_000_000
    assert here() == []


def test_wrong_requests(tandem: Shell, volume: Volume, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    export = ("models", "export", "shapes")
    assert "no model 'absent'" in tandem.error("models", "export", "absent")
    assert "--images-from" in tandem.error(*export, "--data", "absent")
    assert "bad.png: not an image" in tandem.error(*export, "--images-from", str(tmp_path / "bad.png"))
    assert "is a directory" in tandem.error(*export, "--output", str(tmp_path))
    assert "is no directory" in tandem.error(*export, "--output", str(tmp_path / "absent" / "m.onnx"))
    assert "--format torch-export" in tandem.error(*export, "--output", "m.pt2", code=2)
    assert "exclude" in tandem.error(*export, "--data", "shapes", "--images-from", "a.png", code=2)
    assert here() == []


@pytest.mark.parametrize(("model", "dynamic"), [("LSTM", "batch"), ("Transformer", "batch, time")])
def test_language_models(tandem: Shell, volume: Volume, model: str, dynamic: str) -> None:
    publish_language_model(volume, "words", "run-l", model)
    printed = tandem("models", "export", "words").stdout
    assert "checked against words:1 on" in printed
    assert "at batch sizes 1 and 3; open: batch, time" in printed
    assert "same best word for all" in printed
    session = onnxruntime.InferenceSession("words-1.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["model"] == "words:1"
    report = tandem.json("models", "export", "words", "--format", "torch-export")
    assert ", ".join(report["dynamic"]) == dynamic
    assert 0 <= report["relative_difference"] <= report["tolerance"] == TOLERANCE
    assert here() == ["words-1.onnx", "words-1.pt2"]
    assert "leave out --data" in tandem.error("models", "export", "words", "--force", "--data", "shapes")


def wait_for_file(process: "subprocess.Popen[str]") -> None:
    """Wait until the export writes: its file has another name until it has passed the check."""
    deadline = time.monotonic() + 120
    while not list(Path.cwd().glob(".shapes-1.onnx.*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_stopped_export_leaves_nothing(number: int, code: int, tandem: Shell, volume: Volume) -> None:
    write_image_dataset(volume, "many", 1500)
    process = tandem.popen("models", "export", "shapes", "--data", "many", "--images", "1500")
    wait_for_file(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == code
    # click ends the line that ^C stands on.
    assert err.strip() == ""
    deadline = time.monotonic() + 30
    while here() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert here() == []


def test_the_network_as_a_table(tandem: Shell, volume: Volume) -> None:
    card = classifier_card("resnet18", run_id="run-t")
    table = layer_table(build_network(card), torch.zeros(1, 3, SIZE, SIZE))
    checkpoint = step_directory(volume.run("run-t"), 1)
    write_checkpoint(checkpoint, {**classifier_files(card), NETWORK_FILE: to_json(table)})
    Registry(volume).publish("tabled", "classifier", "run-t", checkpoint, card.metrics)
    lines = [line.split() for line in tandem("models", "show", "tabled").stdout.splitlines()]
    assert ["layer1.0.relu", "ReLU", "×2", "(B,64,8,8)", "(B,64,8,8)"] in lines
    assert ["fc", "Linear", "(B,512)", "(B,5)", "2,565"] in lines
    assert lines[-1] == ["52", "layers", "11,179,077"]
    first = tandem.json("models", "show", "tabled")["layers"][0]
    assert (first["name"], first["input"], first["num_parameters"]) == ("conv1", [["B", 3, 32, 32]], 9408)


def test_an_older_checkpoint_has_no_table(tandem: Shell) -> None:
    assert " layers" not in tandem("models", "show", "shapes").stdout
    assert tandem.json("models", "show", "shapes")["layers"] is None


def settled(arch: str, pictures: tuple[Path, ...]) -> nn.Module:
    """Return a network whose statistics and logits are of the size that training gives them."""
    torch.manual_seed(0)
    card = classifier_card(arch)
    network = build_network(card).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
    nn.init.normal_(heads[-1].weight, std=0.1)
    images = load_images(pictures, card.preprocessing)
    with torch.no_grad():
        for _ in range(3):
            network(images)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_both_ways(arch: str, tmp_path: Path) -> None:
    pictures = tuple(tmp_path / f"{number}.png" for number in range(9))
    for number, path in enumerate(pictures):
        draw_shape(SHAPES[number % 3], number, 48).save(path)
    checkpoint = tmp_path / "step-00000001"
    weights = to_bytes(bare_state(settled(arch, pictures)))
    write_checkpoint(checkpoint, classifier_files(classifier_card(arch)) | {WEIGHTS_FILE: weights})
    for name, suffix in SUFFIXES.items():
        output = tmp_path / f"model{suffix}"
        report = export_model(
            ExportRequest(
                checkpoint=checkpoint,
                digest=None,
                label="shapes:1",
                format=name,
                output=output,
                images=pictures,
                batch_size=4,
            )
        )
        assert report.relative_difference <= TOLERANCE
        assert (report.num_images, report.file_bytes) == (9, output.stat().st_size)
