"""What this machine can do without a server, for `tandem bench classify` and `generate`.

The first line of standard input is a Request; JSON lines answer: `ready` with what is measured, then for each Command a
`figure`; or `error` with its message. Between commands it idles, so that a server can be measured in turns with it.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.openmp import limit_spinning

# As the server does, before torch is loaded.
limit_spinning(os.environ)

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from services.inference.bench_models import publish_classifier, publish_language_model  # noqa: E402
from services.inference.calls import rank  # noqa: E402
from services.inference.loading import Served, ServedClassifier, ServedLanguageModel, load  # noqa: E402
from services.inference.runtimes.check import check_pixels  # noqa: E402
from services.inference.runtimes.selection import RuntimeSelector  # noqa: E402
from services.inference.text_table import LiveText, TextTable  # noqa: E402
from tandem.checkpoints.registry import Registry  # noqa: E402
from tandem.data.images import decode_image, resize_and_crop  # noqa: E402
from tandem.errors import InvalidRequest, TandemError  # noqa: E402
from tandem.models.decoding import Text  # noqa: E402
from tandem.models.devices import configure_device, resolve_device  # noqa: E402
from tandem.models.sampling import Sampling  # noqa: E402
from tandem.processes import die_with_parent  # noqa: E402
from tandem.volume import Volume  # noqa: E402

# Of the images that are sent: JPEGs as a camera's library writes them.
_NUM_IMAGES, _QUALITY = 64, 90
_TOP_K = 5
# After these a text begins anew.
TEXT_WORDS = 200
PROMPT_WORDS = 8


@dataclass(frozen=True)
class Request:
    """What to measure: `reference` on the volume `home`, or with "" a made-up model of `kind`, put on that volume.

    Images are written to the folder `images`, which the caller removes.
    """

    kind: Literal["classifier", "language_model"]
    home: str
    reference: str
    images: str
    device: str = "auto"
    engine: str = "auto"
    precision: Literal["float32", "bfloat16", "int8"] = "float32"


@dataclass(frozen=True)
class Command:
    """`images`: a second's, in batches of `size`. `image`: the milliseconds of one. `words`: a second's, `size` texts
    at a time. Each for `seconds`."""

    measure: Literal["images", "image", "words"]
    seconds: float
    size: int = 1


def main() -> None:
    """Answer standard input to its end; exit 0, or 1 after an `error`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, default=os.getppid(), help="end when this process has gone")
    die_with_parent(parser.parse_args().parent)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    # Whatever libraries print goes to the log.
    os.dup2(2, 1)

    def tell(kind: str, **facts: Any) -> None:
        out.write(json.dumps({"type": kind, **facts}) + "\n")

    try:
        _answer(tell)
    except TandemError as error:
        tell("error", message=str(error))
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 whatever it is, the command says it in a line
        traceback.print_exc()
        tell("error", message=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}")
        sys.exit(1)


def _answer(tell: Callable[..., None]) -> None:
    request = Request(**json.loads(sys.stdin.readline()))
    served, device = _load(request)
    if isinstance(served, ServedClassifier):
        measure = Images(served, Path(request.images)).measure
    else:
        measure = Words(served).measure
    tell("ready", **_facts(served, device))
    for line in sys.stdin:
        tell("figure", value=measure(Command(**json.loads(line))))


def _load(request: Request) -> tuple[Served, torch.device]:
    device = resolve_device(request.device)
    configure_device(device)
    volume = Volume(Path(request.home))
    if not request.reference:
        publish = publish_classifier if request.kind == "classifier" else publish_language_model
        publish(volume)
    located = Registry(volume).resolve(request.reference or "bench")
    served = load(located, [device], [RuntimeSelector(device, request.engine, request.precision)])
    if served.card.kind != request.kind:
        other = "classify" if request.kind == "language_model" else "generate"
        raise InvalidRequest(f"{located.label} is a {served.card.kind.replace('_', ' ')}: use 'tandem bench {other}'")
    return served, device


def _facts(served: Served, device: torch.device) -> dict[str, Any]:
    facts = {
        "model": served.located.label,
        "architecture": served.card.architecture,
        "runtime": served.runtime.name,
        "dtype": served.runtime.dtype,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "gpus": [torch.cuda.get_device_name(device)] if device.type == "cuda" else [],
    }
    if isinstance(served, ServedClassifier):
        facts["image_size"] = served.card.preprocessing.image_size
    else:
        facts["vocabulary_size"] = served.card.vocabulary_size
    return facts


class Images:
    """Decodes and classifies in a loop, with all cores for the one and then for the other."""

    def __init__(self, served: ServedClassifier, folder: Path) -> None:
        self._served = served
        self._images = _write_jpegs(folder, served.card.preprocessing.image_size)
        self._workers = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,))

    def measure(self, command: Command) -> float:
        """Return images a second, or the median milliseconds of one image."""
        took = _repeated(lambda number: self._once(number, command.size), command.seconds)
        if command.measure == "image":
            return 1000 * statistics.median(took)
        return command.size * len(took) / sum(took)

    def _once(self, number: int, size: int) -> None:
        some = [self._images[(number * size + place) % len(self._images)] for place in range(size)]
        if size == 1:
            pixels = torch.stack(self._decode(some))
        else:
            parts = [some[first :: self._workers] for first in range(self._workers)]
            pixels = torch.stack([each for part in self._pool.map(self._decode, parts) for each in part])
        rank(self._served.runtime.predict(pixels), _TOP_K).indices.tolist()

    def _decode(self, some: list[bytes]) -> list[torch.Tensor]:
        return [resize_and_crop(decode_image(data), self._served.card.preprocessing) for data in some]


class Words:
    """Steps texts together as the server does; when one has its words, another begins."""

    def __init__(self, served: ServedLanguageModel) -> None:
        self._served = served
        # As on the device's thread of a server.
        torch.set_num_threads(max(2, torch.get_num_threads()))
        served.runtime.warm()

    def measure(self, command: Command) -> float:
        """Return words a second, of all texts together."""
        took = self.took(command.size, command.seconds)
        return command.size * len(took) / sum(took)

    def took(self, num_texts: int, seconds: float) -> list[float]:
        """Return the seconds of each step of `num_texts` texts, of a word each, over `seconds`."""
        table = TextTable(self._served.runtime)

        def begin(seed: int) -> None:
            text = Text(self._served.vocabulary, Sampling(seed=seed))
            prompt = tuple(number % len(self._served.vocabulary) for number in range(PROMPT_WORDS))
            table.add(LiveText(text, text.begin(prompt)[:-1], TEXT_WORDS, 0.0))

        for seed in range(num_texts):
            begin(seed)

        def step(number: int) -> None:
            ended = sum(live.has_ended for live in table.step(0.0))
            for live in table.everyone():
                live.told, live.taken = [], live.text.num_words
            for each in range(ended):
                begin(number * num_texts + each)

        return _repeated(step, seconds)


def _repeated(once: Callable[[int], None], seconds: float) -> list[float]:
    """Call `once` with 0, 1, … for `seconds`, after a first time that does not count; return the seconds of each."""
    once(0)
    took: list[float] = []
    ends_at = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends_at or not took:
        once(len(took))
        took.append(time.perf_counter() - began)
    return took


def _write_jpegs(folder: Path, side: int) -> list[bytes]:
    """Write pictures whose power falls as that of photographs does; return them."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = check_pixels(side)[12:]
    for number in range(_NUM_IMAGES):
        # Rolled, so that no two are equal.
        pixels = torch.roll(scenes[number % len(scenes)], number, dims=2)
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        picture.save(folder / f"{number:03}.jpg", "JPEG", quality=_QUALITY)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


if __name__ == "__main__":
    main()
