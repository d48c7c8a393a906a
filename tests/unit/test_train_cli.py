"""`tandem train`: presets, and options that override them."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tandem.cli.train import train
from tandem.data.corpus import num_windows
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


@pytest.mark.parametrize("name", preset_names("train_classifier"))
def test_every_preset_is_a_whole_spec(name: str) -> None:
    make_spec({"kind": "train_classifier", "dataset": "d", "model_name": "m", **load_preset(name)})
    assert spec("--preset", name).items() >= load_preset(name).items()


def test_the_presets_are_those_of_the_documentation() -> None:
    assert preset_names("train_classifier") == ("accurate-64", "compat-224", "fast-64")


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


def words(*options: str) -> dict[str, Any]:
    result = CliRunner().invoke(train, ["lm", "--data", "d", *options, "--show-spec", "--json"])
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.output)
    return values


@pytest.mark.parametrize("name", preset_names("train_language_model"))
def test_every_preset_of_words_is_a_whole_spec(name: str) -> None:
    assert words("--preset", name).items() >= load_preset(name).items()


def test_the_presets_of_words_are_those_of_the_documentation() -> None:
    names = ("awd-lstm", "awd-lstm-asgd", "compat-lstm", "compat-transformer", "modern-transformer", "ten-minutes")
    assert preset_names("train_language_model") == names


@pytest.mark.parametrize(("name", "rate"), [("compat-lstm", 20), ("compat-transformer", 5)])
def test_the_compatible_presets_of_words_have_the_references_values(name: str, rate: int) -> None:
    sizes = {"embedding_size": 200, "hidden_size": 200, "num_layers": 2, "dropout": 0.2, "batch_size": 20, "bptt": 35}
    recipe = {"optimizer": "sgd", "schedule": "anneal", "clip_norm": 0.25, "weight_decay": 0, "learning_rate": rate}
    assert load_preset(name).items() >= {**sizes, **recipe}.items()


def test_an_option_overrides_a_preset_of_words() -> None:
    values = words("--preset", "compat-lstm", "--model", "GRU", "--epochs", "2")
    assert (values["model"], values["epochs"], values["learning_rate"]) == ("GRU", 2, 20)
    assert values["model_name"] == "d-gru"


def test_a_dry_run_is_one_update_under_a_name_of_its_own() -> None:
    values = words("--model", "LSTM", "--bptt", "10", "--dry-run")
    assert (values["limit_train_tokens"], values["epochs"], values["model_name"]) == (20 * 11, 1, "dry-run")
    assert num_windows(values["limit_train_tokens"] // values["batch_size"], values["bptt"]) == 1


def test_a_dry_run_leaves_named_models_alone() -> None:
    result = CliRunner().invoke(train, ["lm", "--data", "d", "--model", "LSTM", "--name", "wiki", "--dry-run"])
    assert result.exit_code == 2
    assert "leave out --name" in result.output


def test_a_network_must_be_named() -> None:
    result = CliRunner().invoke(train, ["lm", "--data", "d", "--show-spec"])
    assert result.exit_code == 2
    assert "--model is missing" in result.output
