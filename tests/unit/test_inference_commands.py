"""What the commands that call the inference service do before and after the call."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import png, publish_classifier

from tandem.cli.calls import printable, read_images
from tandem.cli.main import main
from tandem.cli.output import console, table
from tandem.errors import InvalidImage
from tandem.volume import Volume

NAMES = ["cat[x].png", "[/bold].png", "[bold]cat[/bold].png", "a:smile:.png", "[link=http://x]y.png"]


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_files_are_no_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = table("image")
    lines.add_row(name)
    console().print(lines)
    console().print(name)
    assert capsys.readouterr().out.split() == ["image", name, name]


def test_names_of_any_bytes_are_sent_and_printed(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"n\xe9\xff") / os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    path.parent.mkdir()
    path.write_bytes(png(0))
    (image,) = read_images([path], lambda path: path.parent.name)
    assert image.name == f"{tmp_path}/n��/caf� é.png"
    assert image.label == "n��"
    for text in (image.name, image.label):
        text.encode()
    assert printable("plain é") == "plain é"


@pytest.mark.parametrize(("name", "says"), [("", "is a folder"), (b"\xff.png", "there is no image"), ("l", "no image")])
def test_what_is_no_file_is_refused_before_the_first_is_read(tmp_path: Path, name: str | bytes, says: str) -> None:
    (tmp_path / "l").symlink_to("nowhere")
    (tmp_path / "good.png").write_bytes(png(0))
    with pytest.raises(InvalidImage, match=says) as caught:
        read_images([tmp_path / "good.png", tmp_path / os.fsdecode(name)])
    str(caught.value).encode()


class Locked(type(Path())):  # type: ignore[misc]
    """A file that its reader may not read, whoever runs the test."""

    def open(self, *arguments: Any, **options: Any) -> io.BytesIO:
        raise PermissionError(13, "Permission denied")


def test_a_file_that_may_not_be_read_is_refused_up_front(tmp_path: Path) -> None:
    for name in ("good.png", "locked.png"):
        (tmp_path / name).write_bytes(png(0))
    with pytest.raises(InvalidImage, match=r"can't read .*locked\.png: Permission denied"):
        read_images([tmp_path / "good.png", Locked(tmp_path / "locked.png")])


def test_models_list_shows_the_whole_ones_and_names_the_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = Volume(tmp_path)
    for name in ("aliases", "good", "version"):
        publish_classifier(volume, name, f"run-{name}")
    (volume.model("aliases") / "aliases.json").write_text("[]")
    (volume.model("version") / "versions" / "0001.json").write_text("{")
    volume.model("good").rename(volume.models / "no name")
    publish_classifier(volume, "good", "run-good")
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["tandem", "models", "list", "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    printed = capsys.readouterr()
    assert [each["name"] for each in json.loads(printed.out)] == ["good"]
    assert [line.split(":")[1] for line in printed.err.splitlines()] == [" aliases", " version"]
