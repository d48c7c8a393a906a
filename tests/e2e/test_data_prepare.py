"""`tandem data`, as a person types it: exit codes, what is printed where, and what a kill leaves behind."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TANDEM = Path(sys.executable).with_name("tandem")
SHARED_DATA = Path(os.environ.get("TANDEM_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")


class Shell:
    """Runs `tandem data …` against a volume of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.datasets = home / "datasets"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TANDEM_HOME": str(self.home)}

    def run(self, *arguments: str | Path, max_file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
        # Not by preexec_fn: gRPC, where a test before has loaded it into this process, would log of the fork.
        limit = [] if max_file_bytes is None else ["prlimit", f"--fsize={max_file_bytes}"]
        command = [*limit, TANDEM, "data", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=200)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start in a process group of its own, as a terminal does."""
        command = [TANDEM, "data", *arguments]
        return subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True, process_group=0)

    def prepared(self, *arguments: str | Path) -> dict[str, object]:
        result = self.run("prepare", *arguments, "--json")
        assert result.returncode == 0, result.stderr
        document = json.loads(result.stdout)
        assert isinstance(document, dict)
        return document

    def refusal(self, *arguments: str | Path, code: int = 1) -> str:
        """Run what fails; return its one line on stderr."""
        result = self.run(*arguments)
        assert (result.returncode, result.stdout) == (code, "")
        lines = result.stderr.splitlines()
        assert len(lines) == 1
        return lines[0]

    def left(self) -> list[str]:
        return sorted(path.name for path in self.datasets.iterdir()) if self.datasets.exists() else []


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "home")


def jpeg(number: int) -> bytes:
    pixels = np.full((32, 32, 3), number % 251, dtype=np.uint8)
    pixels[: number % 31, :, 1] = 200
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, "JPEG")
    return output.getvalue()


def class_folders(root: Path, num_images: int) -> Path:
    for name in ("cats", "dogs", "owls"):
        (root / name).mkdir(parents=True)
        for number in range(num_images):
            (root / name / f"{number:05d}.jpg").write_bytes(jpeg(number))
    return root


def test_own_pictures_from_folder_to_list(shell: Shell, tmp_path: Path) -> None:
    source = class_folders(tmp_path / "pets", 10)
    first = shell.run("prepare", "image-folder", "--source", source, "--name", "pets")
    assert first.returncode == 0
    assert first.stderr == ""
    assert "3 classes (cats, dogs, owls), 32×32 pixels, packed" in first.stdout
    assert "train 27 · val 3 images" in first.stdout
    assert first.stdout.splitlines()[-1] == "Train on it: tandem train classifier --data pets"

    again = shell.prepared("image-folder", "--source", source, "--name", "pets")
    assert again["already_prepared"] is True
    assert again["num_images"] == {"train": 27, "val": 3}
    assert again["path"] == str(shell.datasets / "pets")
    listed = json.loads(shell.run("list", "--json").stdout)
    assert [(entry["name"], entry["kind"]) for entry in listed] == [("pets", "images")]
    assert "pets" in shell.run("list").stdout


def test_own_text(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("one two, three\n" * 30)
    result = shell.run("prepare", "text", "--source", source, "--name", "words", "--max-vocabulary", "5")
    assert "vocabulary of 5 tokens" in result.stdout
    assert "tandem train lm --data words" in result.stdout
    assert "already prepared" not in result.stdout


def test_own_text_in_subwords(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("one two, three\n" * 30)
    arguments = ("prepare", "text", "--source", source, "--name", "parts", "--tokenizer", "subword")
    lines = shell.run(*arguments).stdout.splitlines()
    assert lines[1].endswith("tokens (subword)")
    assert lines[3] == "  train 84 · valid 3 · test 3 words, parted by blanks"
    assert "is already prepared" in shell.run(*arguments).stdout
    assert "(subword)" in shell.run("list").stdout
    assert "--max-vocabulary: 100 is under 258" in shell.refusal(*arguments, "--max-vocabulary", "100")


def test_dummy_data(shell: Shell) -> None:
    result = shell.run(
        "prepare", "dummy", "--classes", "3", "--images", "12", "--val-images", "6", "--image-size", "16"
    )
    assert result.returncode == 0
    assert "3 classes (class_0000, class_0001, class_0002), 16×16 pixels, packed" in result.stdout
    assert result.stdout.splitlines()[-1] == "Train on it: tandem train classifier --data dummy"
    again = shell.prepared("dummy", "--classes", "3", "--images", "12", "--val-images", "6", "--image-size", "16")
    assert again["already_prepared"] is True
    assert again["num_images"] == {"train": 12, "val": 6}
    assert "can't fill 3 classes" in shell.refusal("prepare", "dummy", "--classes", "3", "--images", "2")
    assert "a colour that all images of its class share" in " ".join(
        shell.run("prepare", "dummy", "--help").stdout.split()
    )


def test_an_empty_volume_lists_nothing(shell: Shell) -> None:
    assert "no datasets" in shell.run("list").stdout
    assert json.loads(shell.run("list", "--json").stdout) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("prepare", "bogus"),
        ("prepare", "text", "--name", "a"),
        ("prepare", "image-folder", "--source", "."),
        ("prepare", "image-folder", "--source", ".", "--name", "a", "--val-fraction", "1"),
        ("prepare", "text", "--source", ".", "--name", "a", "--tokenizer", "letters"),
        ("prepare", "dummy", "--classes", "1"),
        ("prepare", "dummy", "--image-size", "7"),
        ("bogus",),
    ],
)
def test_wrong_usage(shell: Shell, arguments: tuple[str, ...]) -> None:
    result = shell.run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


def test_failures_are_one_line(shell: Shell, tmp_path: Path) -> None:
    assert "no file or folder" in shell.refusal("prepare", "tiny-imagenet", "--source", tmp_path / "nowhere")
    page = tmp_path / "a.zip"
    page.write_bytes(b"PK\3\4 and no more")
    assert "no whole zip file" in shell.refusal("prepare", "tiny-imagenet", "--source", page)
    with zipfile.ZipFile(page, "w") as archive:
        archive.writestr("../../evil", b"")
    assert "'../../evil'" in shell.refusal("prepare", "tiny-imagenet", "--source", page)
    unreachable = "http://127.0.0.1:9/a.zip"
    assert "--source FILE" in shell.refusal("prepare", "wikitext-2", "--source", unreachable)
    assert "is not allowed" in shell.refusal("prepare", "text", "--source", page, "--name", "../x")
    assert [name for name in shell.left() if name != ".downloads"] == []


def test_a_volume_without_room(shell: Shell, tmp_path: Path) -> None:
    source = class_folders(tmp_path / "pets", 30)
    command = ("prepare", "image-folder", "--source", source, "--name", "pets")
    # A file may not grow over this: what a full volume looks like from inside. The packed pixels need 3 kB an image.
    result = shell.run(*command, max_file_bytes=100_000)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "TANDEM_HOME must be a writable volume with room" in result.stderr
    assert shell.left() == []


@pytest.mark.parametrize("data", [b"", b"<html>", jpeg(9)[:-120]], ids=["empty", "page", "truncated"])
def test_a_bad_picture_is_named_in_one_line(shell: Shell, tmp_path: Path, data: bytes) -> None:
    source = class_folders(tmp_path / "pets", 10)
    (source / "owls/99999.jpg").write_bytes(data)
    line = shell.refusal("prepare", "image-folder", "--source", source, "--name", "pets")
    assert line.startswith("tandem: owls/99999.jpg does not decode")
    assert line.endswith("; replace it, or remove it from the source")
    assert shell.left() == []


def wait_until_under_way(datasets: Path, name: str) -> None:
    for _ in range(600):
        if len(list((datasets / f".{name}.partial/.work").glob("*-*.json"))) >= 2:
            return
        time.sleep(0.05)
    raise AssertionError("nothing was prepared within 30 s")


def processes_of(group: int) -> list[int]:
    """The live processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def many_pictures(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "many", 6000)


@pytest.mark.parametrize("blow", ["kill", "interrupt"])
def test_a_preparation_that_is_stopped_goes_on(shell: Shell, many_pictures: Path, blow: str) -> None:
    command = ("prepare", "image-folder", "--source", many_pictures, "--name", "pets")
    process = shell.start(*command)
    wait_until_under_way(shell.datasets, "pets")
    if blow == "kill":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=240)

    assert process.returncode == (-signal.SIGKILL if blow == "kill" else 130)
    assert "Traceback" not in errors
    if blow == "interrupt":
        # On a busy machine lines of progress come before it.
        assert "tandem: interrupted; the same command goes on from here" in errors.split("\n")
    for _ in range(100):
        if not processes_of(process.pid):
            break
        time.sleep(0.05)
    assert processes_of(process.pid) == []
    staging = shell.datasets / ".pets.partial"
    done = len(list((staging / ".work").glob("*-*.json")))
    assert done >= 2
    assert not (shell.datasets / "pets").exists()
    before = {path.name: path.stat().st_mtime_ns for path in staging.glob("train/cats/*")}

    document = shell.prepared(*command[1:])
    assert document["num_images"] == {"train": 16200, "val": 1800}
    assert shell.left() == ["pets"]
    after = {path.name: path.stat().st_mtime_ns for path in (shell.datasets / "pets/train/cats").iterdir()}
    # What the notes vouch for was not written again.
    assert sum(after[name] == at for name, at in before.items()) >= 256


def shared_data(*files: str) -> Path:
    for file in files:
        if not (SHARED_DATA / file).is_file():
            pytest.skip(f"needs {SHARED_DATA / file}; set TANDEM_SHARED_DATA to the folder that has it")
    return SHARED_DATA


def assemble(data: Path, into: Path, *parts: str) -> Path:
    subprocess.run([data / "assemble", into, *parts], check=True)
    return into


@pytest.mark.shared_data
def test_wikitext_2_has_its_published_counts(shell: Shell, tmp_path: Path) -> None:
    data = shared_data("wikitext-2.tar.gz")
    document = shell.prepared("wikitext-2", "--source", data / "wikitext-2.tar.gz")
    assert document["vocabulary_size"] == 33278
    assert document["num_tokens"] == {"train": 2088628, "valid": 217646, "test": 245569}
    unpacked = shell.prepared("wikitext-2", "--source", assemble(data, tmp_path / "data", "wikitext-2"))
    assert unpacked["already_prepared"] is True


@pytest.mark.shared_data
def test_all_of_tiny_imagenet(shell: Shell, tmp_path: Path) -> None:
    parts = [*(f"train{number}" for number in range(4)), "val"]
    data = shared_data("assemble", *(f"tiny-imagenet-200.{part}.tar.gz" for part in parts))
    source = assemble(data, tmp_path / "data", "train0", "val")
    message = shell.refusal("prepare", "tiny-imagenet", "--source", source)
    assert "150 of the 200 classes" in message
    assert "--allow-missing" in message
    assert shell.left() == []

    assemble(data, source, *parts[1:4])
    document = shell.prepared("tiny-imagenet", "--source", source)
    assert document["num_images"] == {"train": 100_000, "val": 10_000}
    assert document["num_converted"] == 1821 + 168
    assert (document["image_size"], document["packed"]) == ([64, 64], True)
    classes = document["classes"]
    assert isinstance(classes, list)
    assert len(classes) == 200
    assert classes[0] == {"id": "n01443537", "words": "goldfish, Carassius auratus"}
    assert len(list((shell.datasets / "tiny-imagenet/val/n01443537").iterdir())) == 50
