"""`tandem bench`: measure this machine."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from typing import IO, Any

import click

from tandem.cli.bench_serving import classify, generate
from tandem.cli.output import console, json_option, open_volume, print_json, table
from tandem.cli.train import options, spec_option
from tandem.data.manifest import read_dataset
from tandem.errors import InvalidJob, TrainingFailed
from tandem.jobs.presets import load_preset, preset_names
from tandem.jobs.spec import ClassifierJob, make_spec
from tandem.openmp import limit_spinning
from tandem.processes import how_it_ended, stop

_ENTRY = re.compile(r"(auto|cpu|cuda(:\d+)?)(\+(cpu|cuda(:\d+)?))*")
_MADE_UP = "made-up"
_DEFAULT_IMAGES = 4096
# Evaluation is not measured.
_VAL_IMAGES = 64
_PARTS = ("data", "forward", "backward", "update", "communication", "other")
_COLUMNS = ("device", "precision", "seconds", "epochs", "images", "images/s", "bare step's", "ratio", "n")
_STOP_S = 5.0
# -P: a file called torch.py in the directory where the command is run is not the package.
_COMMAND = (sys.executable, "-P", "-m", "services.trainer.bench")


@click.group()
def bench() -> None:
    """Measure what this machine reaches; nothing is saved, and nothing needs to run."""


bench.add_command(classify)
bench.add_command(generate)


@bench.command()
@options(
    click.option("--devices", default="", help="Such as cpu,cuda:0,cuda:0+cuda:1: each by itself, or several with +."),
    click.option("--data", "dataset", help="A prepared dataset.  [default: made-up images, 64 px, 200 classes]"),
    click.option(
        "--preset", type=click.Choice(preset_names("train_classifier")), help="Named values, at their full image size."
    ),
    spec_option(ClassifierJob, "arch", "Any torchvision classifier.  [default: resnet18]"),
    spec_option(ClassifierJob, "stem", "small: 3×3, stride 1, no pooling (ResNet family)."),
    spec_option(
        ClassifierJob, "image_size", "Side in pixels of the network's input; 64, or the data's own, if left out."
    ),
    spec_option(ClassifierJob, "batch_size", "Images in one update, of all devices together."),
    click.option(
        "--epochs", type=click.IntRange(1, 1000), default=1, show_default=True, help="Passes over the images."
    ),
    click.option(
        "--limit-train-images",
        type=click.IntRange(1),
        default=_DEFAULT_IMAGES,
        show_default=True,
        help="How many images to train on, at most.",
    ),
    spec_option(ClassifierJob, "precision", "bfloat16 computes under autocast; auto: where the device has it."),
    json_option,
)
def train(devices: str, dataset: str | None, preset: str | None, as_json: bool, **values: Any) -> None:
    """Train on each device for what is at hand: seconds, images/s beside the bare step, and where the time goes.

    The bare step is forward, backward and update on one batch that is ready. Made-up images are random pixels.
    """
    given = {**(load_preset(preset) if preset else {}), **{name: each for name, each in values.items() if each}}
    request = {"spec": _spec(dataset, given), "devices": _entries(devices)}
    if dataset:
        # Said before a process is started that needs seconds to import torch.
        read_dataset(open_volume(), dataset)
        request["home"] = str(open_volume().home)
    else:
        request["made_up"] = values["limit_train_images"]
    # The process is ended before its folder goes, wherever Ctrl-C comes: a generator lives as long as a traceback.
    with (
        tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch,
        contextlib.closing(_answers({**request, "scratch": scratch})) as told,
    ):
        answers = list(_shown(told, as_json))
    report = {
        "machine": next(each for each in answers if each["type"] == "machine"),
        "spec": request["spec"],
        "rows": [each for each in answers if each["type"] == "row"],
    }
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _entries(devices: str) -> list[str]:
    entries = [entry.strip() for entry in devices.split(",")] if devices else []
    for entry in entries:
        if not _ENTRY.fullmatch(entry):
            raise click.UsageError(f"--devices: {entry!r} is no device; use auto, cpu, cuda:0, or cuda:0+cuda:1")
    return entries


def _spec(dataset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    # Small images first would be measured at one size and trained at another.
    values = {"arch": "resnet18", "limit_val_images": _VAL_IMAGES, **given, "start_size": None}
    if dataset is None:
        values.setdefault("image_size", 64)
    try:
        spec = make_spec({"kind": "train_classifier", "dataset": dataset or _MADE_UP, "model_name": "bench", **values})
    except InvalidJob as error:
        raise click.UsageError(str(error)) from None
    assert isinstance(spec, ClassifierJob)
    _check_batch(spec.batch_size, given["limit_train_images"])
    return spec.model_dump(mode="json")


def _check_batch(batch_size: int, num_images: int) -> None:
    if batch_size > num_images:
        raise click.UsageError(
            f"--limit-train-images: {num_images} images are no batch of {batch_size}; lower --batch-size"
        )


def _answers(request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Yield the lines of the measuring process; it is ended when this is left."""
    environment = dict(os.environ)
    limit_spinning(environment)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*_COMMAND, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=environment,
            # A terminal's Ctrl-C is ours alone: a library in the middle of its work would print a traceback.
            start_new_session=True,
        )
        try:
            yield from _conversation(process, json.dumps(request))
            if process.wait():
                end = how_it_ended(process.returncode, _said(log), ": lower --batch-size")
                raise TrainingFailed(f"the measuring process {end}")
        finally:
            stop(process, _STOP_S)


def _conversation(process: "subprocess.Popen[str]", request: str) -> Iterator[dict[str, Any]]:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(request)
        process.stdin.close()
    for line in process.stdout:
        answer: dict[str, Any] = json.loads(line)
        if answer["type"] == "error":
            raise TrainingFailed(answer["message"])
        yield answer


def _said(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode("utf-8", "replace")


def _shown(answers: Iterator[dict[str, Any]], as_json: bool) -> Iterator[dict[str, Any]]:
    """Pass the answers on; say on standard error what is being measured."""
    for answer in answers:
        if answer["type"] == "device" and not as_json:
            click.echo(f"measuring {answer['device']} …", err=True)
        yield answer


def _print_report(report: dict[str, Any]) -> None:
    machine, spec, rows = report["machine"], report["spec"], report["rows"]
    images = "made-up images" if spec["dataset"] == _MADE_UP else f"images of {spec['dataset']}"
    stem = f" ({spec['stem']} stem)" if spec["stem"] != "stock" else ""
    echo = console().print
    echo(f"{spec['arch']}{stem}, {rows[0]['image_size']} px, batch {spec['batch_size']}, {images}")
    echo(
        f"{machine['cpu_cores']} CPU cores, torch {machine['torch']}",
        *(f", {name}" for name in machine["gpus"]),
        sep="",
    )
    result = table(*_COLUMNS, *_PARTS)
    for row in rows:
        result.add_row(*_cells(row))
    echo()
    echo(result)
    echo()
    for line in _notes(rows):
        echo(line)


def _cells(row: dict[str, Any]) -> list[str]:
    speeds = (f"{row['images_per_s']:,.0f}", f"{row['bare_images_per_s']:,.0f}", f"{row['ratio']:.2f}")
    parts = [f"{100 * row['shares'][part]:.1f} %" for part in _PARTS]
    trained = (f"{row['seconds']:.1f}", str(row["epochs"]), f"{row['num_images']:,}")
    return [row["device"], row["precision"], *trained, *speeds, str(row["num_turns"]), *parts]


def _notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "seconds: the steps of all epochs, without start and evaluation; bare step's and ratio: medians of n turns"
    timed = max(row["num_timed"] for row in rows)
    yield f"data … other: shares of {timed} further steps; data is the wait for a batch, ready for the network"
    if any(row["device"].startswith("cuda") for row in rows):
        yield "on a GPU those steps wait for it at the border of each part; the others do not"
    if any(row["num_processes"] > 1 for row in rows):
        yield "communication: a step with the gradients exchanged minus one without, taken off backward; bare: without"
