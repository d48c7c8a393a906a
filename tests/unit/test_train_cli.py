"""`tandem train classifier`: presets, and options that override them."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tandem.cli.train import train
from tandem.jobs.presets import load_preset, preset_names
from tandem.jobs.spec import make_spec


def spec(*options: str) -> dict[str, Any]:
    result = CliRunner().invoke(train, ["classifier", "--data", "d", *options, "--show-spec", "--json"])
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.output)
    return values


def refusal(*options: str) -> str:
    result = CliRunner().invoke(train, ["classifier", "--data", "d", *options, "--show-spec"])
    assert result.exit_code == 2
    return result.output.strip().splitlines()[-1]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_whole_spec(name: str) -> None:
    make_spec({"kind": "train_classifier", "dataset": "d", "model_name": "m", **load_preset(name)})
    assert spec("--preset", name).items() >= load_preset(name).items()


def test_the_presets_are_those_of_the_documentation() -> None:
    assert preset_names() == ("accurate-64", "compat-224", "fast-64")


def test_the_compatible_preset_has_the_references_values() -> None:
    values = load_preset("compat-224")
    reference = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 64, "image_size": 224}
    assert values.items() >= reference.items()
    assert (values["schedule"], values["step_epochs"], values["step_factor"]) == ("step", 30, 0.1)
    assert (values["nesterov"], values["decay_all"], values["crop"]) == (False, True, "none")


def test_an_option_overrides_a_preset() -> None:
    values = spec("--preset", "fast-64", "--epochs", "3", "--no-flip", "--no-crop", "--lr", "0.1", "--workers", "2")
    assert (values["epochs"], values["flip"], values["crop"], values["num_workers"]) == (3, False, "none", 2)
    assert values["learning_rate"] == 0.1
    assert values["stem"] == "small"
    assert values["model_name"] == "d-resnet18"


def test_no_crop_is_crop_none() -> None:
    assert spec("--arch", "resnet18", "--no-crop")["crop"] == "none"
    assert spec("--arch", "resnet18", "--crop", "shift")["crop"] == "shift"
    assert spec("--arch", "resnet18")["crop"] == "auto"


def test_weights_are_a_file_or_a_model(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"")
    assert spec("--arch", "resnet18", "--weights", str(file))["weights_file"] == str(file)
    assert spec("--arch", "resnet18", "--weights", "tiny@best")["weights_from"] == "tiny@best"
    assert spec("--arch", "resnet18", "--weights", "run:abc/12")["weights_from"] == "run:abc/12"
    assert "there is no file" in refusal("--arch", "resnet18", "--weights", "resnet18.pth")
    assert "there is no file" in refusal("--arch", "resnet18", "--weights", "some/where")


def test_wrong_usage_is_one_line() -> None:
    assert "--arch is missing" in refusal()
    assert "did you mean resnet18" in refusal("--arch", "resnet81")
