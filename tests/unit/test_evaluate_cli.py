"""`tandem evaluate` before the run and after it, and `tandem compare` of two files: no broker, no server."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import class_names, publish_classifier, publish_language_model

from tandem.checkpoints.files import write_pointer
from tandem.cli.evaluate import _print_report
from tandem.cli.evaluate_text import print_text_report
from tandem.cli.follow import closing_line, progress_text
from tandem.cli.main import main
from tandem.comparison.predictions import PREDICTIONS_FILE, Header, Prediction, ScoredId, write_predictions
from tandem.jobs import record as machine
from tandem.jobs.record import JobRecord, Progress
from tandem.jobs.runs import mirror
from tandem.volume import Volume

IDS = ("cat", "dog")
LABELS = ("cat", "cat", "dog", "dog")
METRICS = {"acc1": 61.5, "acc5": 84.25, "loss": 1.62, "ece": 0.0312}


class Terminal:
    """Runs the command in this process, on a volume of its own, with no system up."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.volume = Volume(home)
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        monkeypatch.setenv("TANDEM_HOME", str(home))
        for name in ("TANDEM_REDIS_URL", "TANDEM_INFERENCE_ADDRESS"):
            monkeypatch.delenv(name, raising=False)

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Return what was printed; on an error, what was said of it."""
        self._monkeypatch.setattr(sys, "argv", ["tandem", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        printed = self._capsys.readouterr()
        assert end.value.code == code, printed.err
        return printed.out if code == 0 else printed.err


@pytest.fixture
def tandem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(tmp_path, monkeypatch, capsys)


def write(path: Path, answers: tuple[str, ...], **changes: Any) -> Path:
    header = {
        "model": "tiny:1",
        "run_id": "run-a",
        "step": 7,
        "architecture": "resnet18",
        "precision": "float32",
        "dataset": "pets",
        "dataset_fingerprint": "0" * 64,
        "split": "val",
        "num_images": len(LABELS),
        "classes": class_names(IDS),
    }
    rows = (
        Prediction(
            file=f"val/{label}/{number}.png",
            label=label,
            top_k=(ScoredId(id=answer, probability=0.9), ScoredId(id="cat", probability=0.1)),
        )
        for number, (label, answer) in enumerate(zip(LABELS, answers, strict=True))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(path, Header.model_validate({**header, **changes}), rows)
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    a = write(tmp_path / "a.jsonl", ("cat", "cat", "dog", "dog"))
    b = write(tmp_path / "b.jsonl", ("cat", "dog", "dog", "cat"), model="tiny:2")
    return str(a), str(b)


def test_two_predictions_files_are_compared_without_a_server(tandem: Terminal, files: tuple[str, str]) -> None:
    found = json.loads(tandem("compare", *files, "--top-k", "1", "--json"))
    assert {"num_images": 4, "num_disagreements": 2, "num_errors": 0, "agreement": 0.5}.items() <= found.items()
    assert (found["a"]["accuracy"], found["b"]["accuracy"]) == (1.0, 0.5)
    assert {"name": "tiny", "version": 2, "run_id": "run-a", "step": 7, "dtype": "float32"}.items() <= (
        found["b"].items()
    )
    assert {"only_a_right": 2, "only_b_right": 0, "exact_p": 0.5}.items() <= found["mcnemar"].items()
    first = found["disagreements"][0]
    assert (first["file"], first["label"], first["a"]["id"], first["b"]["words"]) == (
        "val/cat/1.png",
        "cat",
        "cat",
        "thing og",
    )
    assert len(first["a"]["top_k"]) == 1
    printed = tandem("compare", *files)
    for text in ("tiny:1", "tiny:2", "they agree on 50.0% of 4 images", "McNemar p = 0.5", "val/dog/3.png"):
        assert text in printed


def write_run(volume: Volume, run_id: str, kind: str) -> JobRecord:
    at = machine.now()
    values = {"run_id": run_id, "kind": kind, "dataset": "pets", "model_name": "tiny:1", "queue": "default"}
    record = JobRecord.model_validate({**values, "submitted_at": at, "updated_at": at})
    volume.run(run_id).mkdir(parents=True)
    mirror(volume, record)
    return record


def test_an_evaluation_is_named_by_its_run(tandem: Terminal, files: tuple[str, str]) -> None:
    write_run(tandem.volume, "r-1", "evaluate_classifier")
    assert "evaluation r-1 has no predictions; it is QUEUED" in tandem("compare", "run:r-1", files[0], code=1)
    write(tandem.volume.run("r-1") / PREDICTIONS_FILE, LABELS)
    assert json.loads(tandem("compare", "run:r-1", files[0], "--json"))["num_disagreements"] == 0
    write_run(tandem.volume, "r-3", "evaluate_language_model")
    assert "evaluation r-3 is of a language model" in tandem("compare", "run:r-3", files[0], code=1)
    # The run of a training is a model, as everywhere.
    write_run(tandem.volume, "r-2", "train_classifier")
    assert "'run:r-2' is no predictions file, as the other is" in tandem("compare", "run:r-1", "run:r-2", code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["{a}", "tiny"], 1, "'tiny' is no predictions file, as the other is"),
        (["tiny", "{a}"], 1, "'tiny' is no predictions file"),
        (["{a}", "absent.jsonl"], 1, "there is no predictions file absent.jsonl"),
        (["tiny", "tiny"], 2, "or two predictions files as REFs"),
        (["{a}", "{b}", "--limit", "2"], 2, "don't go with predictions files"),
        (["{a}", "{b}", "--labels-from-folders"], 2, "don't go with predictions files"),
        (["{a}", "{home}/other.jsonl"], 1, "other splits: val and test"),
        (["{a}", "{home}/text"], 1, "is no predictions file; 'tandem evaluate' writes one"),
    ],
)
def test_compare_says_what_is_wrong_with_files(
    tandem: Terminal, files: tuple[str, str], arguments: list[str], code: int, says: str
) -> None:
    home = tandem.volume.home
    write(home / "other.jsonl", LABELS, split="test")
    (home / "text").write_text("hello\n")
    error = tandem("compare", *(each.format(a=files[0], b=files[1], home=home) for each in arguments), code=code)
    assert says in error
    if code == 1:
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing option '--data'"),
        (["--data", "d", "--precision", "int8"], "'int8' is not one of"),
        (["--data", "d", "--batch-size", "0"], "--batch-size"),
        (["--data", "d", "--device", "tpu"], "--device"),
        (["--data", "no/name"], "--data"),
        (["--data", "d", "--no-follow", "--output", "p.jsonl"], "leave out --no-follow"),
        (["--data", "d", "--output", "no/such/folder/p.jsonl"], "in a folder that exists"),
        (["--data", "d", "--output", "."], "give the path of a file"),
        (["--data", "d", "--limit", "0"], "--limit: Input should be greater than or equal to 1 (got 0)"),
        (["--data", "d", "--mode", "fast"], "'fast' is not one of"),
        (["--data", "d", "--mode", "cache", "--limit", "1"], "--limit: Input should be greater than or equal to 2"),
        (["--data", "d", "--mode", "cache", "--cache-lambda", "1"], "--cache-lambda"),
        (["--data", "d", "--mode", "dynamic", "--dynamic-rate", "nan"], "--dynamic-rate"),
        (["--data", "d", "--cache-window", "9"], "--cache-window goes with --mode cache"),
        (["--data", "d", "--mode", "cache", "--dynamic-rate", "9"], "--dynamic-rate goes with --mode dynamic"),
        (
            ["--data", "d", "--mode", "dynamic", "--dynamic-rule", "sgd", "--dynamic-statistics", "9"],
            "--dynamic-statistics goes with --dynamic-rule rms",
        ),
        (["--data", "d", "--mode", "plain", "--flip"], "--flip is for classifiers; tiny is a language model"),
    ],
)
def test_evaluate_wrong_usage(tandem: Terminal, arguments: list[str], says: str) -> None:
    error = tandem("evaluate", "tiny", *arguments, code=2)
    assert "Usage: tandem evaluate" in error
    assert says in error


def test_a_reference_that_is_none_is_wrong_usage(tandem: Terminal) -> None:
    for arguments in ([], ["--mode", "cache"]):
        assert "'a b' is no model reference" in tandem("evaluate", "a b", "--data", "d", *arguments, code=2)


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        ("text", ["--batch-size", "10"], "text is a language model; a text is read as one row, so that perplexity"),
        ("text", ["--top-k", "3"], "--top-k is for classifiers"),
        ("text@latest", ["--no-flip"], "--flip is for classifiers; text@latest is a language model"),
        ("run:run-l", ["--flip"], "--flip is for classifiers"),
        ("pictures", ["--mode", "plain"], "--mode is for language models; pictures is a classifier"),
        ("pictures:1", ["--window", "9"], "--window is for language models"),
    ],
)
def test_the_kind_of_the_model_says_which_options_there_are(
    tandem: Terminal, model: str, arguments: list[str], says: str
) -> None:
    publish_language_model(tandem.volume, "text", "run-l")
    publish_classifier(tandem.volume, "pictures", "run-c")
    write_pointer(tandem.volume.run("run-l"), "latest", tandem.volume.run("run-l") / "checkpoints/step-00000001", {})
    assert says in tandem("evaluate", model, "--data", "d", *arguments, code=2)


def test_a_model_that_is_damaged_is_one_line(tandem: Terminal) -> None:
    version = publish_language_model(tandem.volume, "text", "run-l")
    (tandem.volume.home / version.checkpoint / "model.json").write_text("{}")
    error = tandem("evaluate", "text", "--data", "d", code=1)
    assert "model.json has 2 bytes" in error
    assert len(error.splitlines()) == 1


def test_evaluate_without_a_system_says_how_to_start_one(tandem: Terminal) -> None:
    error = tandem("evaluate", "tiny", "--data", "d", code=1)
    assert error.startswith("tandem: ")
    assert "tandem up" in error
    assert len(error.splitlines()) == 1


def test_the_help_lists_it(tandem: Terminal) -> None:
    listed = [line.split()[0] for line in tandem("--help").splitlines() if line.startswith("  ")]
    assert listed.index("evaluate") == listed.index("runs") + 1
    text = tandem("evaluate", "--help")
    of_both = ("--split", "--limit", "--output", "--no-follow", "--json", "--num-threads")
    for option in (*of_both, "--flip", "--top-k", "--mode", "--cache-theta", "--dynamic-rate", "0.00012 for rms"):
        assert option in text


def test_an_evaluation_is_followed_by_batches_and_ends_with_its_metrics(tmp_path: Path) -> None:
    running = machine.start(write_run(Volume(tmp_path), "r", "evaluate_classifier"))
    running = machine.report(running, Progress(step=3, num_steps=79, rate=1234.5, time_left_s=5))
    assert progress_text(running) == "4 %  batch 3/79  1,234 images/s  5 s left"
    done = machine.finish(machine.report(running, Progress(metrics=METRICS)), model_version=None)
    assert closing_line(done) == (
        "run r SUCCEEDED: tiny:1 on pets  acc@1 61.50 %  acc@5 84.25 %  loss 1.620  calibration error 0.031"
    )


def test_an_evaluation_of_a_text_is_followed_by_words_and_ends_with_each_perplexity(tmp_path: Path) -> None:
    running = machine.start(write_run(Volume(tmp_path), "r", "evaluate_language_model"))
    running = machine.report(running, Progress(step=512, num_steps=245_000, rate=9876.5, time_left_s=25))
    assert progress_text(running) == "0 %  word 512/245000  9,876 words/s  25 s left"
    metrics = {"loss": 4.5, "ppl": 90.017, "dynamic_loss": 4.25, "dynamic_ppl": 70.105}
    done = machine.finish(machine.report(running, Progress(metrics=metrics)), model_version=None)
    assert closing_line(done) == "run r SUCCEEDED: tiny:1 on pets  loss 4.500  ppl 90.02  dynamic ppl 70.11"


def test_the_report_of_a_text_keeps_the_modes_apart(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"loss": 4.5, "ppl": 90.017, "word_ppl": 120.5, "bits_per_byte": 1.234}
    mode = {"cache_loss": 4.0, "cache_ppl": 54.598, "cache_word_ppl": None, "cache_bits_per_byte": None}
    text = {"model": "words:2", "dataset": "wiki", "split": "test", "num_tokens": 245_000, "num_unknown": 6789}
    files = {"token_losses": "/a.npy", "cache_token_losses": "/b.npy"}
    parameters = {"cache_window": 2000, "cache_theta": 0.3, "cache_lambda": 0.1}
    print_text_report({**text, **figures, **mode, **files, "mode": "cache", "parameters": parameters})
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert next(line for line in lines if line.startswith("words:2")).split()[1:] == [
        "4.5000",
        "90.02",
        "120.50",
        "1.2340",
    ]
    assert next(line for line in lines if line.startswith("  with the cache")).split()[3:] == [
        "4.0000",
        "54.60",
        "-",
        "-",
    ]
    for words in ("245,000 tokens of wiki/test (6,789 of them <unk>", "cache: window 2000, theta 0.3, lambda 0.1"):
        assert words in printed
    assert lines[-2:] == ["losses of the tokens: /a.npy", "cache losses of the tokens: /b.npy"]
    print_text_report({**text, **figures, "token_losses": "/a.npy", "mode": "plain", "parameters": {}})
    assert "cache" not in capsys.readouterr().out


def test_the_report_names_the_worst_classes_first(capsys: pytest.CaptureFixture[str]) -> None:
    shares = (90.0, 10.0, 50.0, 0.0, 70.0, 0.0, 30.0)
    classes = [
        {"id": f"n{number}", "words": f"thing {number}", "num_images": 10 + number, "acc1": share}
        for number, share in enumerate(shares)
    ]
    document = {"model": "tiny:1", "dataset": "pets", "split": "val", "num_images": 91, "predictions": "/p.jsonl"}
    _print_report({**document, **METRICS, "flip": {**METRICS, "acc1": 62.0}, "per_class": classes})
    lines = capsys.readouterr().out.splitlines()
    worst = [line.split()[2] for line in lines if line.startswith("thing")]
    assert worst == ["n5", "n3", "n1", "n6", "n2"], "of equal ones that with more images first"
    assert next(line for line in lines if line.startswith("tiny:1")).split()[1:] == (
        ["61.50", "%", "84.25", "%", "1.6200", "0.0312"]
    )
    assert any(line.startswith("  with mirror images") and "62.00 %" in line for line in lines)
