"""`make gpu-check` on a GPU."""

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds no CUDA device"),
]


def test_a_gpu_passes_the_check_within_two_minutes() -> None:
    command = [sys.executable, "-m", "services.gpu_check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch.cuda.get_device_name(0) in done.stdout
