"""`tandem bench classify` and `generate` as a person types them, on a model of the registry and on a made-up one."""

from pathlib import Path

import pytest
from factories import publish_classifier, publish_language_model
from inference_server import start_server
from shell import Shell

from tandem.cli.bench_load import Seen, percentiles_ms
from tandem.cli.bench_serving import Row
from tandem.volume import Volume

QUICK = ("--rounds", "1", "--seconds", "0.5")


@pytest.fixture
def tandem(tmp_path: Path) -> Shell:
    """The command on a volume with a classifier and a language model, with a folder for what is passing."""
    (tmp_path / "passing").mkdir()
    volume = Volume(tmp_path / "home")
    publish_classifier(volume, "pictures", "run-c")
    publish_language_model(volume, "words", "run-l")
    return Shell(volume.home, {"TMPDIR": str(tmp_path / "passing"), "TANDEM_DEVICE": "cpu", "TANDEM_ENGINE": "eager"})


def left(shell: Shell) -> list[str]:
    return [path.name for path in Path(shell.environment["TMPDIR"]).iterdir() if path.name.startswith("tandem-")]


def test_a_model_of_the_running_server(tandem: Shell, tmp_path: Path) -> None:
    server = start_server(tmp_path, Volume(tandem.home), TANDEM_ENGINE="eager")
    try:
        tandem.environment["TANDEM_INFERENCE_ADDRESS"] = server.address
        report = tandem.json("bench", "classify", "pictures", *QUICK)
        assert "is a classifier: use 'tandem bench classify'" in tandem.error("bench", "generate", "pictures", *QUICK)
    finally:
        assert server.stop() == 0
    assert (report["unit"], report["machine"]["model"], report["machine"]["runtime"]) == (
        "images",
        "pictures:1",
        "eager",
    )
    assert [row["name"].split(",")[0] for row in report["rows"]] == [
        "1 image a call",
        "1 image a call",
        "32 images a call",
    ]
    for row in report["rows"]:
        assert row["per_s"] > 0
        assert row["ratio"] == pytest.approx(row["per_s"] / row["limit_per_s"])
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert left(tandem) == []


def test_a_text_model_with_a_server_of_its_own(tandem: Shell) -> None:
    before = sorted(tandem.home.rglob("*"))
    printed = tandem("bench", "generate", "words", *QUICK, "--words", "20").stdout
    heading = next(line for line in printed.splitlines() if "words/s" in line and "ratio" in line)
    for word in ("limit's", "p50 ms", "p99 ms", "first words", "between words"):
        assert word in heading
    assert "words:1: LSTM in float32" in printed
    for name in ("1 text at a time", "8 texts at a time", "32 texts at a time"):
        assert name in printed
    assert sorted(tandem.home.rglob("*")) == before, "nothing is left on the volume"
    assert left(tandem) == []


def test_percentiles_are_of_what_was_seen() -> None:
    assert percentiles_ms([]) == {}
    assert percentiles_ms([0.001 * number for number in range(1, 101)]) == pytest.approx(
        {"p50_ms": 51.0, "p95_ms": 96.0, "p99_ms": 100.0}
    )


def test_a_row_takes_ratios_turn_by_turn() -> None:
    turns = [Seen(2.0, [0.1], num_items=num_items, client_cpu_share=0.5) for num_items in (10, 40, 30)]
    document = Row("way", [10.0, 10.0, 30.0], turns).document()
    assert (document["per_s"], document["limit_per_s"], document["ratio"]) == (15.0, 10.0, 0.5)
    assert (document["num_calls"], document["client_cpu_share"]) == (3, 0.5)
    assert "first_words" not in document
