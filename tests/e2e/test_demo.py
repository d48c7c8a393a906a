"""The demonstration, on small data of one's own."""

import os
import signal
from pathlib import Path

import pytest
from rig import processes, wait_for
from samples import write_sentences, write_shapes
from shell import Shell


@pytest.fixture
def own_data(tmp_path: Path) -> tuple[str, ...]:
    images, text = write_shapes(tmp_path / "images"), write_sentences(tmp_path / "text.txt")
    return "--images", str(images), "--text", str(text)


def still_running(shell: Shell) -> list[str]:
    return [command for _, command in processes() if str(shell.home) in command]


def test_the_demo_takes_ones_own_data_and_shows_the_whole_path(shell: Shell, own_data: tuple[str, ...]) -> None:
    result = shell.json("demo", *own_data)
    assert [run["state"] for run in result["runs"]] == ["SUCCEEDED"] * 3
    assert len(result["classify"]) == 3
    assert all(image["top_k"] for image in result["classify"])
    assert result["compare"]["num_images"] == 15
    assert len(result["compare"]["files"]) == result["compare"]["num_disagreements"]
    assert len(result["generate"]["text"].split()) > 20
    assert list((shell.home / "runs").glob("*/tensorboard/events*"))
    assert not still_running(shell)
    # A second demo on the same data trains nothing again.
    again = shell.json("demo", *own_data)
    assert [run["run_id"] for run in again["runs"]] == [run["run_id"] for run in result["runs"]]
    assert again["compare"] == result["compare"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_broken_off_leaves_nothing_running(shell: Shell, own_data: tuple[str, ...], number: int) -> None:
    process = shell.popen("demo", *own_data)
    wait_for(lambda: list((shell.home / "runs").glob("*/checkpoints/*")), 120.0, "training")
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not still_running(shell)
    assert all(run["state"] in ("CANCELED", "SUCCEEDED") for run in shell.json("runs", "list"))


def test_a_demo_that_fails_half_way_leaves_nothing_running(shell: Shell, own_data: tuple[str, ...]) -> None:
    # In the place where the second run's model is to be registered.
    (shell.home / "models").mkdir(parents=True)
    (shell.home / "models" / "demo-shufflenet").write_text("in the way")
    line = shell("demo", *own_data, code=1).stderr.strip().splitlines()[-1]
    assert line.startswith("tandem: run ")
    assert "trained, but not published: can't write" in line
    assert not still_running(shell)
    assert [run["state"] for run in shell.json("runs", "list")] == ["FAILED", "SUCCEEDED"]


def test_too_little_data_is_found_before_anything_is_trained(shell: Shell, own_data: tuple[str, ...]) -> None:
    Path(own_data[3]).write_text("one two\nthree four\nfive six\n")
    line = shell("demo", *own_data, code=1).stderr.strip().splitlines()[-1]
    assert "words to train on; 40 are needed" in line
    assert not list((shell.home / "runs").glob("*"))


def test_data_that_is_not_there_is_a_wrong_use(shell: Shell) -> None:
    assert "does not exist" in shell.error("demo", "--images", "/no/such/folder", code=2)
