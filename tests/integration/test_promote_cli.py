"""Promotion as a person types it: an alias moves where the comparison says so, and the server follows it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import png, publish_classifier, write_image_dataset
from inference_server import ServerProcess, start_server
from terminal import Terminal
from waiting import PATIENCE_S, wait_for

from tandem.checkpoints.registry import Registry
from tandem.client import Client
from tandem.volume import Volume


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Versions 1 and 2 of `racer`, with other weights, and a dataset `shapes`."""
    directory = tmp_path_factory.mktemp("promotion")
    volume = Volume(directory / "home")
    for version, seed in ((1, 12), (2, 13)):
        publish_classifier(volume, "racer", f"run-{version}", seed=seed)
    write_image_dataset(volume, "shapes", 70, ())
    server = start_server(directory, volume, TANDEM_ENGINE="eager")
    try:
        with Client(server.address) as client:
            client.wait_until_serving("racer", timeout_s=PATIENCE_S)
        yield server
    finally:
        server.kill()


@pytest.fixture
def tandem(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Terminal:
    monkeypatch.setenv("TANDEM_HOME", str(server.volume.home))
    monkeypatch.setenv("TANDEM_INFERENCE_ADDRESS", server.address)
    return Terminal(monkeypatch, capsys)


def test_the_better_version_is_promoted_and_the_worse_is_not(tandem: Terminal, server: ServerProcess) -> None:
    found = tandem.json("compare", "racer:1", "racer:2", "--data", "shapes")
    assert found["difference"]["value"] != 0, "one of them is better on these images"
    worse, better = (1, 2) if found["difference"]["value"] > 0 else (2, 1)
    assert tandem.json("models", "promote", f"racer:{worse}", "--to", "production") == {
        "name": "racer",
        "alias": "production",
        "version": worse,
        "previous_version": None,
        "promoted": True,
        "reason": "nothing had the alias",
        "evidence": None,
    }
    gate = ["--to", "production", "--if-better-than", "racer@production", "--on", "shapes", "--alpha", "0.999"]
    said = tandem("models", "promote", f"racer:{better}", *gate, "--min-gain", "0.9", code=1)
    assert "racer@production stays where it is: the gain is below 90 points" in said
    printed = tandem("models", "promote", f"racer:{better}", *gate)
    assert f"racer@production is racer:{better}, before racer:{worse}: " in printed
    said = tandem("models", "promote", f"racer:{worse}", *gate, code=1)
    assert f"racer:{worse} is no better than racer:{better}" in said
    registry = Registry(server.volume)
    assert registry.aliases("racer")["production"] == better
    refused, moved, kept = registry.history("racer")[-3:]
    assert (refused["refused"], moved["to"], kept["refused"]) == (better, better, worse)
    assert moved["evidence"]["against"] == f"racer:{worse}"
    with Client(server.address) as client:
        wait_for(lambda: client.classify("racer@production", [png(0)]).model.version == better)
        assert tandem.json("models", "rollback", "racer")["version"] == worse
        wait_for(lambda: client.classify("racer@production", [png(0)]).model.version == worse)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["racer:1", "--to", "latest"], "moves by itself"),
        (["racer:9", "--to", "production"], "no version 9"),
        (["run:run-1/1", "--to", "production"], "is a checkpoint of a run"),
        (["racer:1", "--to", "x", "--if-better-than", "racer:1", "--on", "shapes"], "is what it is to beat"),
        (["racer:1", "--to", "x", "--if-better-than", "racer:2", "--on", "nothing"], "no dataset 'nothing'"),
        (["racer:1", "--to", "x", "--on", "shapes", "--alpha", "2"], "alpha is 2.0"),
    ],
)
def test_what_makes_no_sense_is_one_line(tandem: Terminal, arguments: list[str], said: str) -> None:
    assert said in tandem("models", "promote", *arguments, code=1)
