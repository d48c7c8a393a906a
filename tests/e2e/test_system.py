"""The whole system by the commands that a person types."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rig import processes
from samples import write_sentences, write_shapes
from shell import Shell
from waiting import wait_for

LM = ("--emsize", "16", "--nhid", "16", "--bptt", "8", "--batch-size", "4")


@pytest.fixture(scope="module")
def trained(system: Shell, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A system with data, two classifiers and a language model."""
    folder = tmp_path_factory.mktemp("source")
    system("data", "prepare", "image-folder", "--source", str(write_shapes(folder / "shapes")), "--name", "shapes")
    system("data", "prepare", "text", "--source", str(write_sentences(folder / "text.txt")), "--name", "words")
    for arch, name in (("resnet18", "a"), ("squeezenet1_1", "b")):
        options = ("--arch", arch, "--data", "shapes", "--epochs", "2", "--batch-size", "16", "--name", name)
        system("train", "classifier", *options, "--follow")
    system("train", "lm", "--model", "LSTM", "--data", "words", "--epochs", "3", "--name", "lm", *LM, "--follow")
    return system


def val_images(shell: Shell) -> list[str]:
    return sorted(str(path) for path in (shell.home / "datasets/shapes/val").glob("*/*.png"))


def test_status_says_what_runs_and_where(system: Shell) -> None:
    status = system.json("status")
    assert {"broker", "trainer", "inference", "tensorboard"} <= status.keys()
    assert all(status[name]["running"] for name in ("broker", "trainer", "inference"))
    host, port = status["inference"]["address"].rsplit(":", 1)
    assert host == "127.0.0.1"
    socket.create_connection((host, int(port)), timeout=5).close()
    assert "running" in system("status").stdout


def test_a_second_system_on_the_same_volume_is_refused(system: Shell) -> None:
    assert "has a system running already" in system.error("up", "--detach")
    assert "has a system running already" in system.error("up")


def test_runs_and_models_tell_what_scripts_rely_on(trained: Shell) -> None:
    runs = trained.json("runs", "list")
    assert [run["state"] for run in runs] == ["SUCCEEDED"] * 3
    shown = trained.json("runs", "show", runs[0]["run_id"])
    assert {"run_id", "kind", "state", "attempt", "epoch", "step", "metrics"} <= shown.keys()
    assert trained.json("runs", "show", "latest")["run_id"] == runs[0]["run_id"]
    models = {model["name"]: model for model in trained.json("models", "list")}
    assert set(models) == {"a", "b", "lm"}
    assert (models["a"]["kind"], models["lm"]["kind"]) == ("classifier", "language_model")
    assert models["a"]["aliases"] == {"latest": 1, "best": 1}
    assert "epoch 2" in trained("runs", "logs", runs[0]["run_id"]).stdout


def test_follow_with_json_streams_lines(trained: Shell) -> None:
    result = trained(
        "train", "lm", "--model", "GRU", "--data", "words", "--epochs", "1", "--name", "gru", *LM, "--follow", "--json"
    )
    first, *rest = result.stdout.splitlines()
    assert set(json.loads(first)) == {"run_id"}
    assert '"SUCCEEDED"' in rest[-1]


def test_classify_names_the_images_and_their_classes(trained: Shell) -> None:
    images = val_images(trained)
    answer = trained.json("classify", "a", *images, "--top-k", "2")
    text = trained("classify", "a", images[0]).stdout
    assert Path(images[0]).name in text
    assert "%" in text
    assert answer


def test_a_broken_image_is_named_and_the_others_are_classified(trained: Shell, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 not a jpeg")
    result = trained("classify", "a", val_images(trained)[0], str(broken), code=1)
    assert "%" in result.stdout
    assert "broken.jpg" in result.stderr + result.stdout


def test_comparing_a_model_with_itself_finds_nothing(trained: Shell) -> None:
    answer = trained.json("compare", "a", "a:1", "--data", "shapes")
    assert (answer["num_images"], answer["num_disagreements"]) == (15, 0)


def test_compare_on_data_and_on_files_agree(trained: Shell) -> None:
    on_data = trained.json("compare", "a", "b", "--data", "shapes")
    on_files = trained.json("compare", "a", "b", *val_images(trained))
    assert {"num_images", "num_disagreements", "a", "b", "mcnemar"} <= on_data.keys()
    assert on_data["num_disagreements"] == on_files["num_disagreements"]
    assert on_data["mcnemar"] is not None
    assert on_files["mcnemar"] is None, "plain files have no labels"


def test_generate_is_reproducible_and_writes_utf8(trained: Shell, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    options = ("--words", "60", "--seed", "3")
    first, second = (trained("generate", "lm", *options).stdout for _ in range(2))
    assert first == second
    assert trained("generate", "lm", "--words", "60", "--seed", "4").stdout != first
    trained("generate", "lm", *options, "--output", str(file))
    lines = file.read_text("utf-8").splitlines()
    assert [len(line.split()) for line in lines[:2]] == [20, 20]


def test_wrong_requests_get_one_line_and_the_right_code(trained: Shell) -> None:
    image = val_images(trained)[0]
    assert "no model 'nobody'" in trained.error("classify", "nobody", image)
    assert "version 9" in trained.error("classify", "a:9", image)
    assert "model reference" in trained.error("classify", "../etc", image)
    assert "prompt" in trained.error("generate", "lm", "--prompt", "")
    assert "language model" in trained.error("classify", "lm", image).replace("_", " ")
    assert "no dataset 'nothing'" in trained.error("train", "classifier", "--arch", "resnet18", "--data", "nothing")
    classifier = ("train", "classifier", "--data", "shapes", "--arch")
    assert "did you mean resnet18" in trained.error(*classifier, "resnet81", code=2)
    assert "--epochs" in trained.error(*classifier, "resnet18", "--epochs", "0", code=2)
    assert "--name: the name 'a b'" in trained.error(*classifier, "resnet18", "--name", "a b", code=2)
    assert "'lm' is a language model" in trained.error(*classifier, "resnet18", "--batch-size", "16", "--name", "lm")
    assert "no run" in trained.error("runs", "show", "20200101-000000-abcdef")
    trained.error("train", "classifier", "--epochs", "many", "--arch", "resnet18", "--data", "shapes", code=2)
    assert "did you mean 'generate'" in trained.error("genrate", code=2)
    trained.error("compare", "a", "b", code=2)


def test_cancel_and_ctrl_c_of_a_follower(trained: Shell) -> None:
    options = ("--model", "LSTM", "--data", "words", "--epochs", "5000", "--name", "endless", *LM)
    follower = trained.popen("train", "lm", *options, "--follow")

    def newest() -> dict[str, Any]:
        return trained.json("runs", "list")[0]  # type: ignore[no-any-return]

    wait_for(lambda: newest()["model_name"] == "endless" and newest()["step"] > 0, "the first step")
    run_id = newest()["run_id"]
    os.killpg(follower.pid, signal.SIGINT)
    _, err = follower.communicate(timeout=120)
    assert follower.returncode == 130
    assert f"run {run_id} goes on" in err
    assert trained.json("runs", "show", run_id)["state"] == "RUNNING"
    assert trained.json("runs", "cancel", run_id, "--wait")["state"] == "CANCELED"
    assert (trained.home / "runs" / run_id / "latest.json").is_file()


def test_what_needs_the_system_says_how_to_start_it(shell: Shell) -> None:
    assert "tandem up" in shell.error("classify", "a", __file__)
    assert "tandem up" in shell.error("runs", "cancel", "20200101-000000-abcdef")
    assert shell("runs", "list").stdout.startswith("no runs yet")
    assert shell.json("runs", "list") == []
    assert shell.json("models", "list") == []
    assert shell.json("status")["broker"]["running"] is False
    assert "nothing was running" in shell("down").stdout


def test_a_broker_that_is_down_is_named(shell: Shell, tmp_path: Path) -> None:
    shell("data", "prepare", "text", "--source", str(write_sentences(tmp_path / "t.txt")), "--name", "words")
    shell.environment["TANDEM_REDIS_URL"] = "redis://127.0.0.1:1/0"
    line = shell.error("train", "lm", "--model", "LSTM", "--data", "words")
    assert "redis://127.0.0.1:1/0" in line
    assert not (shell.home / "runs").exists() or not list((shell.home / "runs").iterdir())
    assert shell.json("runs", "list") == []


def test_a_port_in_use_is_named_and_nothing_is_left_running(shell: Shell) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = shell.error("up", "--detach", "--port", str(port))
    assert str(port) in line
    assert "in use" in line
    wait_for(lambda: not _processes_of(shell), "the end of all processes")


def test_a_tensorboard_port_in_use_is_named(shell: Shell) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = shell.error("up", "--detach", "--tensorboard-port", str(port))
    assert f"tensorboard can't listen on 127.0.0.1:{port}: Address already in use" in line
    wait_for(lambda: not _processes_of(shell), "the end of all processes")


def test_ctrl_c_while_the_system_starts_leaves_nothing_running(shell: Shell) -> None:
    process = shell.popen("up", "--detach")
    wait_for(lambda: (shell.home / "local" / "inference.log").is_file(), "the start")
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=240)
    assert process.returncode == 130
    wait_for(lambda: not _processes_of(shell), "the end of all processes")


def test_doctor_finds_what_is_wrong(shell: Shell, tmp_path: Path) -> None:
    findings = {finding["name"]: finding for finding in shell.json("doctor")}
    assert findings["PyTorch"]["state"] == "ok"
    assert findings["volume"]["state"] == "ok"
    assert findings["broker"]["state"] == "off"
    (tmp_path / "file").write_text("")
    shell.home = tmp_path / "file"
    result = shell("doctor", code=1)
    assert "can't be written" in result.stdout
    assert "set TANDEM_HOME to a folder of yours" in result.stdout


def test_a_volume_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    line = Shell(in_the_way / "home").error("up", "--detach")
    assert "can't write" in line
    assert "TANDEM_HOME" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_however_up_ends_nothing_is_left_running(shell: Shell, number: int) -> None:
    process = shell.popen("up", "--no-tensorboard")
    wait_for(lambda: (shell.home / "local" / "system.json").is_file(), "the system")
    assert len(_processes_of(shell)) >= 4
    shell("data", "prepare", "text", "--source", str(write_sentences(shell.home / "t.txt")), "--name", "words")
    run_id = shell.json("train", "lm", "--model", "LSTM", "--data", "words", "--epochs", "5000", *LM)["run_id"]
    wait_for(lambda: shell.json("runs", "show", run_id)["step"] > 0, "the first step")
    os.kill(process.pid, number)
    process.communicate(timeout=240)
    if number != signal.SIGKILL:
        assert process.returncode == 0
        assert shell.json("runs", "show", run_id)["state"] == "QUEUED"
    wait_for(lambda: not _processes_of(shell), "the end of all processes")


def _processes_of(shell: Shell) -> list[str]:
    """Return the command lines of processes that belong to the shell's volume."""
    found = []
    for pid, command in processes():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if str(shell.home).encode() in environment or str(shell.home) in command:
            found.append(command)
    return found


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, runpy; sys.argv = ['tandem', '--help']\ntry: runpy.run_module('tandem', run_name='__main__')\n"
    code += (
        "except SystemExit: pass\nprint(sorted({'torch', 'redis', 'celery', 'grpc', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
