"""A ResNet-18 on a part of Tiny-ImageNet and an LSTM on a part of WikiText-2, trained and served."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from shell import Shell

pytestmark = pytest.mark.shared_data


def shared_data() -> Path:
    """Return the folder of real data, or skip saying what is missing."""
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("TANDEM_SHARED_DATA", default))
    if not (folder / "assemble").is_file():
        pytest.skip(f"needs the real datasets: {folder}/assemble is not there (set TANDEM_SHARED_DATA)")
    return folder


@pytest.fixture(scope="module")
def real(system: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A system with both datasets; a quarter of Tiny-ImageNet's classes is enough here."""
    source = tmp_path_factory.mktemp("real")
    subprocess.run([shared_data() / "assemble", source, "train0", "val", "wikitext-2"], check=True)
    tiny = ("--source", str(source), "--allow-missing")
    system("data", "prepare", "tiny-imagenet", *tiny)
    system("data", "prepare", "wikitext-2", "--source", str(source))
    return system


def test_a_resnet18_trains_on_a_part_and_is_served(real: Shell) -> None:
    options = ("--arch", "resnet18", "--data", "tiny-imagenet", "--epochs", "2", "--name", "tiny")
    limits = ("--limit-train-images", "1500", "--limit-val-images", "250")
    real("train", "classifier", *options, *limits, "--learning-rate", "0.02", "--follow")
    run = real.json("runs", "show", "latest")
    events = (real.home / "runs" / run["run_id"] / "events.jsonl").read_text().splitlines()
    epochs = [event for event in map(json.loads, events) if event["type"] == "epoch"]
    first_loss, second_loss = (epoch["metrics"]["train_loss"] for epoch in epochs)
    assert second_loss < first_loss - 0.05, "the second epoch profits from the first"
    images = sorted((real.home / "datasets/tiny-imagenet/val").glob("*/val_1*.JPEG"))[:3]
    answer = real("classify", "tiny", *map(str, images)).stdout
    assert all(image.name in answer for image in images)
    card = real.json("models", "show", "tiny")
    assert len(card["classes"]) == 50
    assert card["classes"][0]["id"].startswith("n0")
    assert card["classes"][0]["words"]
    first = int(min((real.home / "runs" / run["run_id"] / "checkpoints").iterdir()).name.removeprefix("step-"))
    other = f"run:{run['run_id']}/{first}"
    compared = real.json("compare", "tiny", other, "--data", "tiny-imagenet", "--limit", "250")
    assert compared["num_images"] == 250
    assert all(each["file"].startswith("val/") for each in compared["disagreements"])


def test_an_lstm_trains_on_wikitext_and_generates(real: Shell, tmp_path: Path) -> None:
    limits = ("--limit-train-tokens", "40000", "--limit-val-tokens", "5000")
    real(
        "train", "lm", "--model", "LSTM", "--data", "wikitext-2", "--epochs", "1", "--name", "wiki", *limits, "--follow"
    )
    metrics = real.json("runs", "show", "latest")["metrics"]
    assert metrics["val_ppl"] < 3000, "33,278 would be a guess"
    assert metrics["test_ppl"] < 3000
    file = tmp_path / "text.txt"
    real("generate", "wiki", "--words", "1000", "--seed", "1", "--output", str(file))
    assert len(file.read_text("utf-8").split()) == 1000
    assert real.json("models", "show", "wiki")["vocabulary_size"] == 33_278
