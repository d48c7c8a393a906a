"""Whether a host's GPU does all that Tandem asks of it: `make gpu-check`, or `python -m services.gpu_check`.

It looks at the device, trains one epoch on made-up images in bfloat16 by the real training process, and has the real
server answer for that checkpoint, in bfloat16 too. Neither broker nor data are needed, and what it wrote is removed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.cli.bench_processes import own_server
from tandem.client import Client
from tandem.data.prepare.dummy import prepare_dummy
from tandem.errors import TandemError, Unavailable
from tandem.gpus import list_gpus
from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import make_spec
from tandem.volume import Volume

RUN_ID = "20200101-000000-00000000"
# For all of it: who waits for longer has a GPU that does not work as it should.
_TIMEOUT_S = 115.0
_NUM_IMAGES, _IMAGE_SIZE = 512, 64
# In bfloat16 a product of so many terms is off by its last of 8 bits, and little more.
_TOLERANCE = 2e-2

# In a process of its own, whose context of CUDA ends with it.
_LOOK = f"""
import json, sys, torch
device = torch.device(sys.argv[1])
generator = torch.Generator().manual_seed(0)
a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
wide = a.double() @ b.double()
narrow = (a.bfloat16().to(device) @ b.bfloat16().to(device)).cpu().double()
error = float((narrow - wide).abs().mean() / wide.abs().mean())
name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
print(json.dumps({{"name": name, "cuda": torch.version.cuda, "error": error, "is_exact": error < {_TOLERANCE}}}))
"""


def main() -> None:
    """Print a line for each part as it is done; exit 1 with one line that says what does not work."""
    device, timeout_s = _parse_arguments()
    began = time.monotonic()
    by = began + timeout_s
    try:
        with tempfile.TemporaryDirectory(prefix="tandem-gpu-check-") as folder:
            volume = Volume(Path(folder) / "home")
            if device != "cpu":
                _tell("driver", see_gpus)
            # Each of them multiplies; the first trains and serves.
            for each in [device] if device == "cpu" else devices(device):
                _tell("bfloat16", lambda each=each: look(each, by))  # type: ignore[misc]
            _tell("training", lambda: train(volume, device, by))
            _tell("serving", lambda: serve(volume, device, Path(folder), by))
    except (TandemError, OSError, ValueError) as error:
        sys.exit(f"tandem gpu-check: {' '.join(str(error).split())}")
    print(f"all of it works, {time.monotonic() - began:.0f} s")  # noqa: T201


def _parse_arguments() -> tuple[str, float]:
    parser = argparse.ArgumentParser("python -m services.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda:0", help="cpu tries the check itself  [default: cuda:0]")
    parser.add_argument("--timeout", type=float, default=_TIMEOUT_S, metavar="S", help="seconds for all of it")
    arguments = parser.parse_args()
    return str(arguments.device), float(arguments.timeout)


def _tell(part: str, does: Callable[[], str]) -> None:
    began = time.monotonic()
    found = does()
    print(f"{part:<9} {found} ({time.monotonic() - began:.1f} s)", flush=True)  # noqa: T201


def see_gpus() -> str:
    """Return what the driver says of the GPUs; raise Unavailable where there is none."""
    gpus = list_gpus()
    if not gpus:
        raise Unavailable(
            "no GPU here: 'nvidia-smi' has to list one; a container also needs NVIDIA's runtime (TANDEM_RUNTIME=nvidia)"
        )
    return ", ".join(f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in gpus)


def devices(first: str) -> list[str]:
    """Return `first`, and the other GPUs that the driver lists."""
    return [first, *(name for number in range(len(list_gpus())) if (name := f"cuda:{number}") != first)]


def look(device: str, by: float = math.inf) -> str:
    """Return what torch sees at `device`, which multiplies in bfloat16 as it should; raise Unavailable."""
    output = _finished(f"torch on {device}", [sys.executable, "-c", _LOOK, device], by)
    facts = json.loads(output.splitlines()[-1])
    if not facts["is_exact"]:
        raise Unavailable(f"{facts['name']} multiplies wrongly in bfloat16: off by {facts['error']:.1%} on average")
    return f"{facts['name']}, CUDA {facts['cuda']}, off by {facts['error']:.2%}"


def train(volume: Volume, device: str, by: float = math.inf) -> str:
    """Train an epoch in bfloat16, by the process that trains; return its loss. Raises Unavailable."""
    prepare_dummy(volume, num_images=_NUM_IMAGES, num_val_images=64, image_size=_IMAGE_SIZE)
    run = volume.run(RUN_ID)
    run.mkdir(parents=True)
    job = {"kind": "train_classifier", "dataset": "dummy", "model_name": "check", "arch": "resnet18", "epochs": 1}
    spec = make_spec({**job, "batch_size": 64, "device": device, "precision": "bfloat16"})
    (run / SPEC_FILE).write_text(spec.model_dump_json())
    output = _finished("training", [sys.executable, "-m", "services.trainer.run", str(run), "--attempt", "1"], by)
    ended: dict[str, Any] = json.loads(output.splitlines()[-1])
    if ended.get("outcome") != "succeeded":
        raise Unavailable(f"training failed: {ended.get('message') or ended}")
    return f"resnet18 in bfloat16, {_NUM_IMAGES} images"


def serve(volume: Volume, device: str, folder: Path, by: float = math.inf) -> str:
    """Have a server answer for what was trained; return what it says of its runtime. Raises a TandemError."""
    image = min(volume.dataset("dummy").rglob("*.png")).read_bytes()
    # Eager, since a compiler may be missing, and is not asked about here.
    with (
        _environment(TANDEM_DEVICE=device, TANDEM_PRECISION="bfloat16", TANDEM_ENGINE="eager"),
        own_server(volume.home, folder) as address,
        Client(address, _left_s(by)) as client,
    ):
        (result,) = client.classify(f"run:{RUN_ID}", [image], top_k=10).results
        details = client.get_model(f"run:{RUN_ID}")
    total, runtime = sum(guess.probability for guess in result.top_k), details.runtime
    if result.error or not math.isclose(total, 1.0, abs_tol=0.01):
        raise Unavailable(f"the server answered wrongly: {result.error or f'probabilities add up to {total:.3f}'}")
    if runtime is None or runtime.dtype != "bfloat16":
        raise Unavailable(f"the server does not compute in bfloat16: {runtime.reason if runtime else 'no runtime'}")
    return f"an image in {runtime.dtype} on {', '.join(details.devices)}"


@contextmanager
def _environment(**variables: str) -> Any:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _left_s(by: float) -> float:
    return min(_TIMEOUT_S, max(1.0, by - time.monotonic()))


def _finished(what: str, command: list[str], by: float) -> str:
    """Return the output of a command that succeeds in time; raise Unavailable with the last that it said."""
    try:
        left_s = None if by == math.inf else max(1.0, by - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, timeout=left_s)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{what} did not end in the time that the check has (--timeout)") from None
    if done.returncode or not done.stdout.strip():
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise Unavailable(f"{what} failed: {said[0]}")
    return done.stdout


if __name__ == "__main__":
    main()
