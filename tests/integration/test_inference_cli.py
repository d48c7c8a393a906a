"""What a person types: classify, compare, generate and models, against a real server."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from factories import CLASS_IDS, MODELS, png
from inference_server import BROKEN_PLACES, ServerProcess, environment
from terminal import Terminal

from tandem.client import Client

pytest_plugins = ["inference_fixtures"]


@pytest.fixture
def tandem(
    server: ServerProcess, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Terminal:
    monkeypatch.setenv("TANDEM_HOME", str(server.volume.home))
    monkeypatch.setenv("TANDEM_INFERENCE_ADDRESS", server.address)
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / CLASS_IDS[number] / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(png(number))
    return paths


def test_classify(tandem: Terminal, pictures: list[Path]) -> None:
    printed = tandem("classify", "a", *pictures, "--top-k", "2")
    assert "a:1 (squeezenet1_1, float32)" in printed
    assert all(str(path) in printed for path in pictures)
    assert printed.count("%") == 6
    document = tandem.json("classify", "a", pictures[0])
    assert document["model"]["version"] == 1
    (result,) = document["results"]
    assert result["file"] == str(pictures[0])
    assert len(result["top_k"]) == 5
    assert result["error"] is None


def test_classify_names_what_fails(tandem: Terminal, pictures: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"junk")
    assert f"{broken}: not an image" in tandem("classify", "a", pictures[0], broken, code=1)
    assert "no image /nowhere/x.png" in tandem("classify", "a", "/nowhere/x.png", code=1)
    assert "is a folder" in tandem("classify", "a", tmp_path, code=1)
    assert "no model 'x' in the registry" in tandem("classify", "x", pictures[0], code=1)
    assert "is a language model" in tandem("classify", "LSTM", pictures[0], code=1)
    assert "Missing argument" in tandem("classify", "a", code=2)


def test_names_that_are_no_text_or_look_like_markup(tandem: Terminal, tmp_path: Path) -> None:
    paths = [tmp_path / os.fsdecode(name) for name in (b"caf\xe9.png", b"cat[x].png", b"[b]:smile:.png")]
    for number, path in enumerate(paths):
        path.write_bytes(png(number))
    document = tandem.json("classify", "a", *paths)
    assert [each["file"] for each in document["results"]] == [
        f"{tmp_path}/{name}" for name in ("caf�.png", "cat[x].png", "[b]:smile:.png")
    ]
    printed = tandem("compare", "a", "three", *paths)
    assert all(name in printed for name in ("caf�.png", "cat[x].png", "[b]:smile:.png"))
    paths[0].write_bytes(b"junk")
    assert "caf�.png: not an image" in tandem("classify", "a", *paths, code=1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stdout_that_can_not_show_a_character(server: ServerProcess, tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "\u03bb.png"
    path.write_bytes(png(0))
    command = [sys.executable, "-c", "from tandem.cli.main import main; main()"]
    for arguments in (
        ["classify", "a", str(path)],
        ["compare", "a", "three", str(path)],
        ["generate", "LSTM", "--prompt", "\u03bb", "--words", "3"],
    ):
        done = subprocess.run(
            [*command, *arguments],
            env=environment(TANDEM_INFERENCE_ADDRESS=server.address, PYTHONIOENCODING=encoding),
            capture_output=True,
            timeout=240,
            check=False,
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
        # Click itself takes ASCII for UTF-8.
        assert (b"?" in done.stdout) or encoding == "ascii"


def test_compare_images(tandem: Terminal, pictures: list[Path]) -> None:
    document = tandem.json("compare", "a", "b", *pictures, "--labels-from-folders")
    assert document["num_images"] == 3
    assert document["num_disagreements"] == len(document["disagreements"])
    assert document["mcnemar"]["num_labelled"] == 3
    assert document["a"]["name"] == "a"
    assert 0 <= document["a"]["accuracy"] <= 1
    assert tandem.json("compare", "a", "a", *pictures)["num_disagreements"] == 0
    assert tandem.json("compare", "a", "b", *pictures)["mcnemar"] is None
    assert "they agree on" in tandem("compare", "a", "b", *pictures)


def test_compare_on_a_dataset(tandem: Terminal) -> None:
    document = tandem.json("compare", "a", "b", "--data", "shapes")
    assert (document["num_images"], document["num_errors"]) == (68, 2)
    assert {error["file"] for error in document["errors"]} == {
        f"val/{CLASS_IDS[place % 5]}/val_{place}.png" for place in BROKEN_PLACES
    }
    for each in document["disagreements"]:
        assert each["a"]["id"] != each["b"]["id"]
        assert each["label"] == each["file"].split("/")[1]
    printed = tandem("compare", "a", "b", "--data", "shapes", "--limit", "20")
    assert "McNemar p" in printed
    assert "1 can't be read" in printed


@pytest.mark.parametrize(
    "arguments",
    [[], ["x.png", "--data", "shapes"], ["x.png", "--limit", "3"], ["--data", "shapes", "--labels-from-folders"]],
)
def test_compare_wrong_usage(tandem: Terminal, arguments: list[str]) -> None:
    assert "Usage" in tandem("compare", "a", "b", *arguments, code=2)


def test_generate(tandem: Terminal, tmp_path: Path) -> None:
    output = tmp_path / "text.txt"
    options = ("generate", "LSTM", "--prompt", "the cat", "--words", "45", "--seed", "3")
    text = tandem(*options, "--output", output)
    assert text.startswith("the cat")
    lines = output.read_text("utf-8").splitlines()
    assert [len(line.split()) for line in lines] == [20, 20, 5]
    *pieces, last = [json.loads(line) for line in tandem(*options, "--json").splitlines()]
    summary = last["summary"]
    assert "".join(piece["text"] for piece in pieces) == summary["text"]
    assert f"the cat{summary['text']}\n" == text
    assert (summary["num_words"], summary["seed"]) == (45, 3)
    assert [word for piece in pieces for word in piece["words"]] == " ".join(lines).split()


@pytest.mark.parametrize("model", MODELS)
def test_generate_on_this_machine_writes_what_the_server_writes(tandem: Terminal, tmp_path: Path, model: str) -> None:
    options = ("generate", model, "--prompt", "the cat zebra", "--words", "150", "--seed", "3", "--top-p", "0.95")
    printed = tandem(*options, "--json")
    served, local = tmp_path / "served.txt", tmp_path / "local.txt"
    tandem(*options, "--output", served)
    own = tandem(*options, "--local", "--json", "--output", local)
    *_, summary = (json.loads(line)["summary"] for line in printed.splitlines()[-1:])
    *_, own_summary = (json.loads(line)["summary"] for line in own.splitlines()[-1:])
    # The server steps texts together, by other products than one alone has: their last bits differ.
    assert own_summary.pop("perplexity") == pytest.approx(summary.pop("perplexity"), rel=1e-5)
    assert own_summary == summary
    assert local.read_bytes() == served.read_bytes()


def test_a_comparison_is_a_page_too(tandem: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The images come from the server: the person at the terminal has no volume.
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "elsewhere"))
    page = tmp_path / "page.html"
    found = tandem.json("compare", "a", "b", "--data", "shapes", "--report", page)
    text = page.read_text()
    assert found["verdict"] in text.replace("&#39;", "'")
    assert text.count("data:image/png;base64,") == found["num_disagreements"] > 0
    assert found["disagreements"][0]["file"] in text
    assert found["difference"]["interval"][0] <= found["difference"]["value"] <= found["difference"]["interval"][1]
    assert sum(each["num_images"] for each in found["classes"]) == found["num_images"]
    printed = tandem("compare", "a", "b", "--data", "shapes")
    assert found["verdict"] in printed.replace("\n", " ")
    assert "there is no folder" in tandem(
        "compare", "a", "b", "--data", "shapes", "--report", tmp_path / "no" / "x.html", code=1
    )


def test_a_page_of_files_shows_them(tandem: Terminal, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(png(number))
    found = tandem.json("compare", "a", "b", *paths, "--report", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == found["num_disagreements"] > 0
    assert "not at hand" not in page


def test_local_needs_no_server_and_says_what_is_wrong(
    tandem: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TANDEM_INFERENCE_ADDRESS")
    text = tandem("generate", "GRU", "--local", "--random-start", "--words", "30", "--stop", "<eos>", "--seed", "1")
    assert text.count("\n") == 1
    assert (
        tandem("generate", "GRU:1", "--local", "--random-start", "--words", "30", "--stop", "\n", "--seed", "1") == text
    )
    for arguments, line in (
        (["a"], "a:1 is a classifier"),
        (["absent"], "no model 'absent'"),
        (["GRU", "--prompt", " "], "the prompt is empty"),
        (["GRU", "--prompt", os.fsdecode(b"caf\xe9")], "the prompt is not UTF-8 text, at character 4"),
        (["GRU", "--words", "100001"], "100,000"),
        (["GRU", "--min-p", "2"], "min_p is 2.0"),
        (["GRU", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["GRU", "--stop", "zebra"], "stop word 'zebra' is not in the model's vocabulary"),
        (["GRU", "--stop", os.fsdecode(b"caf\xe9")], "the stop word is not UTF-8"),
    ):
        assert line in tandem("generate", "--local", *arguments, code=1)
    monkeypatch.setenv("TANDEM_DEVICE", "cuda:77")
    assert "TANDEM_DEVICE='cuda:77'" in tandem("generate", "--local", "GRU", code=1)


def test_generate_says_what_is_wrong(tandem: Terminal, tmp_path: Path) -> None:
    assert "the prompt is empty" in tandem("generate", "LSTM", "--prompt", "", code=1)
    assert "a:1 is a classifier" in tandem("generate", "a", code=1)
    assert "temperature is -1.0" in tandem("generate", "LSTM", "--temperature", "-1", code=1)
    assert "100,000" in tandem("generate", "LSTM", "--words", "100001", code=1)
    assert "no folder" in tandem("generate", "LSTM", "--output", tmp_path / "no" / "x.txt", code=1)
    assert "Invalid value" in tandem("generate", "LSTM", "--words", "many", code=2)
    assert "exclude" in tandem("generate", "LSTM", "--prompt", "the", "--random-start", code=2)
    assert "stop word 'zebra'" in tandem("generate", "LSTM", "--stop", "zebra", code=1)


@pytest.mark.parametrize("how", [[], ["--local"]])
def test_interrupted_it_keeps_what_is_on_the_screen_and_writes_no_file(
    server: ServerProcess, tmp_path: Path, how: list[str]
) -> None:
    output = tmp_path / "text.txt"
    command = [sys.executable, "-c", "from tandem.cli.main import main; main()"]
    process = subprocess.Popen(
        [*command, "generate", "LSTM", "--words", "100000", "--output", str(output), *how],
        env=environment(TANDEM_INFERENCE_ADDRESS=server.address, TANDEM_HOME=str(server.volume.home)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    seen = process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(seen) == 200
    assert b"Traceback" not in complaints
    assert list(tmp_path.iterdir()) == []


def test_models(tandem: Terminal) -> None:
    models = {each["name"]: each for each in tandem.json("models", "list")}
    assert models["a"]["kind"] == "classifier"
    assert models["LSTM"]["latest"] == 1
    assert models["a"]["aliases"] == {"latest": 1, "best": 1}
    card = tandem.json("models", "show", "a")
    assert (card["version"], card["arch"], len(card["classes"])) == (1, "squeezenet1_1", 5)
    assert "thing 00, thing 01" in tandem("models", "show", "a:1")
    assert "language model" in tandem("models", "list")
    assert "no model 'x'" in tandem("models", "show", "x", code=1)
    assert "no model reference" in tandem("models", "show", "../x", code=1)


def test_no_server_and_no_address(
    tandem: Terminal, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TANDEM_INFERENCE_ADDRESS", "127.0.0.1:1")
    assert "no inference server answers at 127.0.0.1:1" in tandem("classify", "a", pictures[0], code=1)
    monkeypatch.delenv("TANDEM_INFERENCE_ADDRESS")
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    assert "no inference server: start the system" in tandem("classify", "a", pictures[0], code=1)
