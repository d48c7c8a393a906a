"""How fast this machine trains, each device beside its bare step: `python -m services.trainer.bench --parent PID`.

A request comes as one JSON document on standard input (`Request`); JSON lines answer: `machine` once, `device` before
each measurement and `row` after it, or `error` with its message. Nothing is saved.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException, start_processes

from services.trainer.engine.memory import is_out_of_memory
from services.trainer.engine.ranks import ALONE, Ranks
from services.trainer.speed import Row, measure
from tandem.data.manifest import MANIFEST_FILE, ClassName, ImageDataset
from tandem.errors import InvalidRequest, OutOfMemory, TandemError, TrainingFailed
from tandem.jobs.spec import ClassifierJob, make_spec
from tandem.models.devices import resolve_device
from tandem.processes import die_with_parent
from tandem.volume import Volume, to_json

# Of made-up images, as Tiny-ImageNet's.
_SIDE, _NUM_CLASSES, _NUM_VAL = 64, 200, 64


@dataclass(frozen=True)
class Request:
    """What to measure: `spec` on each of `devices` ("cpu", "cuda:0", "cpu+cpu"; none: all there are).

    The data lie on the volume `home`; where that is None, `made_up` train images are made in the folder `scratch`,
    which the caller removes.
    """

    spec: dict[str, Any]
    devices: list[str]
    scratch: str
    home: str | None = None
    made_up: int = 0


def main() -> None:
    """Answer the request on standard input; exit 0 if all was measured, 1 after an `error`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process has gone")
    die_with_parent(parser.parse_args().parent)
    # An orderly end: the processes of a group are ended with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    # Whatever libraries print goes to the log.
    os.dup2(2, 1)

    def tell(kind: str, **facts: Any) -> None:
        out.write(json.dumps({"type": kind, **facts}) + "\n")

    try:
        _answer(Request(**json.loads(sys.stdin.read())), tell)
    except TandemError as error:
        tell("error", message=str(error))
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 whatever it is, the command says it in a line
        traceback.print_exc()
        tell("error", message=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}")
        sys.exit(1)


class Tell(Protocol):
    """Writes one line of the answer."""

    def __call__(self, kind: str, **facts: Any) -> None:
        """Write `facts` under their kind."""
        ...


def _answer(request: Request, tell: Tell) -> None:
    groups = [device_group(entry) for entry in request.devices or _all_devices()]
    tell("machine", **machine())
    volume = Volume(Path(request.home or request.scratch))
    spec = ClassifierJob.model_validate(request.spec)
    if request.home is None:
        _make_up(volume, spec.dataset, request.made_up)
    for group in groups:
        tell("device", device="+".join(group))
        tell("row", **asdict(_measure_group(spec, volume, group, Path(request.scratch))))


def _all_devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def device_group(entry: str) -> list[str]:
    """Return the devices of "cuda:0+cuda:1"; raise InvalidRequest if one is not here, or they can't go together."""
    group = [str(resolve_device(name)) for name in entry.split("+")]
    if len(group) > 1:
        # cuda alone would be any.
        group = ["cuda:0" if name == "cuda" else name for name in group]
    if len({torch.device(name).type for name in group}) > 1:
        raise InvalidRequest(f"--devices {entry}: one run trains on devices of one kind; use a comma between them")
    if group[0] != "cpu" and len(set(group)) < len(group):
        raise InvalidRequest(f"--devices {entry}: each GPU takes one process; name different ones")
    return group


def machine() -> dict[str, Any]:
    """Return what the figures depend on: cores, GPUs by name, versions."""
    return {
        "cpu_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
    }


def _make_up(volume: Volume, name: str, num_train: int) -> None:
    try:
        write_made_up(volume, name, num_train)
    except OSError as error:
        raise TrainingFailed(
            f"can't write {num_train:,} made-up images to {volume.home}: {error.strerror}; lower --limit-train-images, "
            "or set TMPDIR to a folder with room"
        ) from error


def write_made_up(volume: Volume, name: str, num_train: int) -> None:
    """Write `num_train` packed images of random pixels, in the shape of Tiny-ImageNet: 64 px, 200 classes."""
    directory = volume.dataset(name)
    (directory / "packed").mkdir(parents=True)
    (directory / "index").mkdir()
    generator = np.random.default_rng(0)
    counts = {"train": num_train, "val": _NUM_VAL}
    for split, count in counts.items():
        shape = (count, 3, _SIDE, _SIDE)
        pixels = np.lib.format.open_memmap(directory / "packed" / f"{split}.npy", "w+", np.dtype(np.uint8), shape)
        for row in range(0, count, 1000):
            part = pixels[row : row + 1000]
            part[:] = generator.integers(0, 256, part.shape, dtype=np.uint8)
        rows = (json.dumps({"file": f"{split}/{row}", "label": row % _NUM_CLASSES}) for row in range(count))
        (directory / "index" / f"{split}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    classes = tuple(ClassName(id=f"class_{label}", words=f"class {label}") for label in range(_NUM_CLASSES))
    manifest = ImageDataset(
        name=name, fingerprint="0" * 64, source="made up", classes=classes, num_images=counts,
        image_size=(_SIDE, _SIDE), packed=True,
    )  # fmt: skip
    (directory / MANIFEST_FILE).write_bytes(to_json(manifest.model_dump(mode="json")))


def _measure_group(spec: ClassifierJob, volume: Volume, group: Sequence[str], scratch: Path) -> Row:
    """Measure on one device in this process, on several in a process each."""
    if len(group) == 1:
        return _explained(_with(spec, device=group[0]), volume, group, ALONE)
    several = _with(spec, device=torch.device(group[0]).type, num_devices=len(group))
    answers = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        arguments = (several, volume, group, Path(folder) / "store", answers)
        context = start_processes(  # type: ignore[no-untyped-call]
            _rank, arguments, len(group), join=False, daemon=True, start_method="spawn"
        )
        try:
            while not context.join():
                pass
        except ProcessException as error:
            # The first message is the reason; the others have lost contact.
            raise TrainingFailed(_first_error(answers) or f"{'+'.join(group)}: {error}".splitlines()[0]) from error
    row: Row = answers.get()
    return row


def _with(spec: ClassifierJob, **changes: Any) -> ClassifierJob:
    """Return `spec` with `changes`, validated anew."""
    changed = make_spec({**spec.model_dump(), **changes})
    assert isinstance(changed, ClassifierJob)
    return changed


def _first_error(answers: Any) -> str | None:
    while not answers.empty():
        if isinstance(answer := answers.get(), str):
            return answer
    return None


def _rank(rank: int, spec: ClassifierJob, volume: Volume, group: Sequence[str], store: Path, answers: Any) -> None:
    """Be process `rank` of the group; the first one puts the row into `answers`, any one its error."""
    die_with_parent(os.getppid())
    on_gpu = torch.device(group[0]).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(torch.device(group[rank]))
    try:
        # A file instead of a port: nothing listens, and nothing can be taken.
        meeting = f"file://{store}"
        dist.init_process_group("nccl" if on_gpu else "gloo", meeting, rank=rank, world_size=len(group))
        control = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
        row = _explained(spec, volume, group, Ranks(rank, len(group), control))
        dist.destroy_process_group()
    except Exception as error:  # whatever it is, the command says it in a line
        answers.put(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise
    if rank == 0:
        answers.put(row)


def _explained(spec: ClassifierJob, volume: Volume, group: Sequence[str], ranks: Ranks) -> Row:
    try:
        return measure(spec, volume, "+".join(group), ranks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise OutOfMemory(f"{'+'.join(group)} has no memory for it ({reason}); lower --batch-size") from error


if __name__ == "__main__":
    main()
