"""`make gpu-check`: one line where there is no GPU; all of it on a CPU, which shows that the check itself works."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from services import gpu_check
from tandem.errors import Unavailable
from tandem.models.devices import resolve_precision
from tandem.volume import Volume

CPU = torch.device("cpu")


def check(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "services.gpu_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = check()
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tandem gpu-check: no GPU here")


@pytest.mark.skipif(resolve_precision("auto", CPU) != "bfloat16", reason="this CPU has no bfloat16 instructions")
def test_it_computes_trains_and_serves_in_bfloat16() -> None:
    # A CPU that others use takes its time.
    done = check("--device", "cpu", "--timeout", "900")
    assert (done.returncode, done.stderr) == (0, "")
    parts = [line.split()[0] for line in done.stdout.splitlines()]
    assert parts == ["bfloat16", "training", "serving", "all"]


@pytest.mark.skipif(resolve_precision("auto", CPU) == "bfloat16", reason="this CPU has bfloat16 instructions")
def test_a_device_without_bfloat16_is_told_in_one_line() -> None:
    done = check("--device", "cpu", "--timeout", "900")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["bfloat16", "training"]
    (line,) = done.stderr.splitlines()
    assert "cpu has no instructions for it" in line


def test_what_takes_too_long_is_ended_and_told_in_one_line() -> None:
    done = check("--device", "cpu", "--timeout", "0")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "tandem gpu-check: torch on cpu did not end in the time that the check has (--timeout)"


def test_a_device_that_computes_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = gpu_check._LOOK.replace(".cpu().double()", ".cpu().double() * 1.1")
    monkeypatch.setattr(gpu_check, "_LOOK", wrong)
    with pytest.raises(Unavailable, match="multiplies wrongly in bfloat16: off by 10"):
        gpu_check.look("cpu")


def test_training_that_fails_is_told_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"training failed: .*cuda:7"):
        gpu_check.train(Volume(tmp_path), "cuda:7")
