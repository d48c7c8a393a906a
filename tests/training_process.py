"""The training process by hand: start it, read its events, and what it leaves behind."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.checkpoints.files import read_pointer, read_verified
from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import make_spec
from tandem.volume import Volume


def new_run(volume: Volume, run_id: str, values: dict[str, Any]) -> Path:
    run = volume.run(run_id)
    run.mkdir(parents=True)
    (run / SPEC_FILE).write_text(make_spec(values).model_dump_json())
    return run


def start(run: Path, attempt: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "services.trainer.run", str(run), "--attempt", str(attempt)]
    log = open(run / "log.txt", "a")  # noqa: SIM115
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env={**os.environ}
    )


def events(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def finish(run: Path, attempt: int = 1) -> dict[str, Any]:
    process = start(run, attempt)
    (*_, last) = events(process)
    process.wait(240)
    assert last["outcome"] == "succeeded", (last, (run / "log.txt").read_text()[-2000:])
    return last


def end_state(run: Path) -> dict[str, bytes]:
    checkpoint = read_pointer(run, "latest")
    assert checkpoint is not None
    files = read_verified(checkpoint)
    return {name: files[name] for name in ("model.safetensors", "trainer_state.safetensors")}
