"""A volume with models, and an inference server over it as a process of its own, for the benchmarks of serving."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from benchmarks.runtimes import NUM_CLASSES, PREPROCESSING, SIDE, trained
from services.inference.runtimes.check import check_pixels
from tandem.checkpoints.card import ClassifierCard, LanguageModelCard
from tandem.checkpoints.files import MODEL_FILE, VOCABULARY_FILE, WEIGHTS_FILE, step_directory, write_checkpoint
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.tensors import build_network, to_bytes
from tandem.client import Client
from tandem.data.manifest import ClassName
from tandem.data.vocabulary import build_vocabulary
from tandem.models.weights import bare_state
from tandem.volume import Volume

VOCABULARY_SIZE = 33_278
START_S = 120.0
SERVER = ("-m", "services.inference.server")
# JPEGs of 64×64 as a camera's library writes them.
QUALITY = 90


@dataclass
class Server:
    """A server process that answers at `address`."""

    process: "subprocess.Popen[bytes]"
    address: str

    @property
    def resident_mib(self) -> float:
        """What the process holds of memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        """End it, at the latest after some seconds."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def volume() -> Iterator[Volume]:
    """Return a volume that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-", ignore_cleanup_errors=True) as folder:
        yield Volume(Path(folder))


@contextmanager
def serving(home: Path, *models: str, command: Sequence[str] = SERVER, **settings: str) -> Iterator[Server]:
    """Run the server of `command`, with `models` loaded, and what users have by default but for `settings`."""
    port_file = home / f"port-{time.monotonic_ns()}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    environment |= {"TANDEM_HOME": str(home), "TANDEM_DEVICE": os.environ.get("TANDEM_DEVICE", "auto"), **settings}
    arguments = ["--listen", "127.0.0.1:0", "--port-file", str(port_file)]
    with open(home / "server.log", "ab") as log:
        process = subprocess.Popen([sys.executable, *command, *arguments], env=environment, stdout=log, stderr=log)
    server = Server(process, "")
    try:
        _await(port_file, process, home / "server.log")
        server.address = port_file.read_text().strip()
        for model in models:
            # Until it is loaded and warm.
            with Client(server.address, timeout_s=START_S) as client:
                client.get_model(model)
        yield server
    finally:
        server.stop()


def _await(port_file: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def publish_classifier(home: Volume, name: str = "resnet", run_id: str = "resnet-1", seed: int = 0) -> None:
    """Publish a ResNet-18 of 200 classes at 64 px as the next version of `name`."""
    write_classifier(home, name, run_id, seed)()


def write_classifier(
    home: Volume, name: str = "resnet", run_id: str = "resnet-1", seed: int = 0
) -> Callable[[], object]:
    """Write its checkpoint; return what publishes it."""
    classes = tuple(ClassName(id=f"n{number:08}", words=f"class {number}") for number in range(NUM_CLASSES))
    card = ClassifierCard(**_common(run_id), arch="resnet18", classes=classes, preprocessing=PREPROCESSING)
    return _written(home, name, "classifier", card, trained(seed), {})


def publish_language_model(home: Volume, model: str, **sizes: int) -> None:
    """Publish a language model of 33,278 words in the sizes of the report's script, under its name in small letters."""
    words = build_vocabulary([" ".join(f"word{number}" for number in range(VOCABULARY_SIZE - 2))], "words")
    shape = {"embedding_size": 200, "hidden_size": 200, "num_layers": 2, "num_heads": 2, "dropout": 0.2, "tied": False}
    card = LanguageModelCard(
        **_common(f"{model.lower()}-1"),
        **{**shape, "context_length": 35, **sizes},
        model=model,
        vocabulary_size=len(words),
    )
    torch.manual_seed(0)
    files = {VOCABULARY_FILE: words.to_json()}
    _written(home, model.lower(), "language_model", card, build_network(card), files)()


def _common(run_id: str) -> dict[str, object]:
    basis: dict[str, object] = {"run_id": run_id, "epoch": 1, "step": 1, "seed": 0, "num_parameters": 1}
    return basis | {
        "dataset": "made up",
        "dataset_fingerprint": "0" * 64,
        "metrics": {"val_loss": 1.0},
        "library_versions": {"torch": torch.__version__},
    }


def _written(
    home: Volume,
    name: str,
    kind: str,
    card: ClassifierCard | LanguageModelCard,
    network: nn.Module,
    files: dict[str, bytes],
) -> Callable[[], object]:
    checkpoint = step_directory(home.run(card.run_id), card.step)
    weights = to_bytes(bare_state(network))
    write_checkpoint(checkpoint, {MODEL_FILE: card.model_dump_json().encode(), WEIGHTS_FILE: weights, **files})
    return partial(Registry(home).publish, name, kind, card.run_id, checkpoint, dict(card.metrics))


def write_jpegs(folder: Path, count: int = 64) -> Path:
    """Write pictures of 64×64 whose power falls as that of photographs does; return the folder."""
    folder.mkdir()
    scenes = check_pixels(SIDE)[12:]
    for number in range(count):
        # Rolled, so that no two are equal.
        pixels = torch.roll(scenes[number % len(scenes)], number, dims=2)
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        image.save(folder / f"{number:05}.jpg", "JPEG", quality=QUALITY)
    return folder
