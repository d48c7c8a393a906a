"""The demonstration, on small data of one's own."""

import os
import signal
from pathlib import Path

import pytest
from rig import processes
from samples import write_sentences, write_shapes
from shell import Shell
from waiting import wait_for


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


def test_a_demo_broken_off_leaves_nothing_running(shell: Shell, own_data: tuple[str, ...]) -> None:
    process = shell.popen("demo", *own_data)
    wait_for(lambda: list((shell.home / "runs").glob("*/checkpoints/*")), "training")
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not still_running(shell)
    assert all(run["state"] in ("CANCELED", "SUCCEEDED") for run in shell.json("runs", "list"))


def test_a_demo_that_fails_half_way_leaves_nothing_running(shell: Shell, own_data: tuple[str, ...]) -> None:
    # As many words as the demo takes at the most: the language model learns for longer than a cancel takes to come.
    write_sentences(Path(own_data[-1]), lines=20_000)
    demo = shell.popen("demo", *own_data)
    wait_for(lambda: len(list((shell.home / "runs").glob("*/job.json"))) == 3, "the third run")
    third = max(path.parent.name for path in (shell.home / "runs").glob("*/job.json"))
    shell("runs", "cancel", third)
    _, err = demo.communicate(timeout=240)
    assert demo.returncode == 1
    assert err.strip().splitlines()[-1].startswith(f"tandem: run {third}")
    assert not still_running(shell)
    assert [run["state"] for run in shell.json("runs", "list")] == ["CANCELED", "SUCCEEDED", "SUCCEEDED"]
