"""Target: packing images runs at 0.9 times the decoder's own speed over all cores. RESULTS.md says what is reached.

The decoder's own speed: PIL decodes JPEG bytes that lie in memory to uint8 arrays, in a process for each core. Packing:
as many processes read the same images from a tree in the page cache, decode them and write their rows of the packed
file. Whole: `data prepare`, from that tree to the published dataset, with a copy of each image, hashes, index and sync;
the seconds of its stages are printed. All take turns. On a machine that others
use too, the processor time of an image says more than the wall.

TANDEM_TINY_IMAGENET names an unpacked Tiny-ImageNet; without it 20,000 made-up JPEGs of 64×64 are prepared.
"""

import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
from PIL import Image

from tandem.data.manifest import ImageDataset
from tandem.data.prepare import prepare_image_folder, prepare_tiny_imagenet
from tandem.data.prepare.image_writer import Chunk, ImageWriter, Item, chunks_of, create_packed
from tandem.data.prepare.sources import TreeSource
from tandem.volume import Volume

ROUNDS = 3
# Of the images for the decoder and for packing; the whole prepares all of them.
MOST_IMAGES = 20_000
SIDE = 64


@dataclass(frozen=True)
class Cost:
    """What some images took: seconds by the clock, and of all processors together."""

    num_images: int
    seconds: float
    cpu_s: float

    @property
    def speed(self) -> float:
        """Images/s."""
        return self.num_images / self.seconds

    @property
    def cpu_us(self) -> float:
        """Processor time of one image in microseconds."""
        return self.cpu_s / self.num_images * 1e6


Task = Callable[[], None]
Prepare = Callable[[Volume], ImageDataset]


def main() -> None:
    """Print images/s of decoder, packing and whole, with the median of their ratios round by round."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        tree, prepare = find_source(Path(folder))
        files = sorted(
            str(path.relative_to(tree)) for path in tree.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg")
        )
        files = [file for file in files if not file.startswith("test/")]
        print(f"{len(files):,} images, {cores} cores\n")
        rounds = [one_round(tree, files, prepare, Path(folder), cores) for _ in range(ROUNDS)]
    print(f"\n| | images/s | min | max | of the decoder's | CPU µs an image | decoder's of it | n = {ROUNDS} rounds |")
    print("|---|---|---|---|---|---|---|---|")
    for what in rounds[0]:
        speeds = [each[what].speed for each in rounds]
        ratio = statistics.median(each[what].speed / each["decoder"].speed for each in rounds)
        cpu = statistics.median(each[what].cpu_us for each in rounds)
        share = statistics.median(each["decoder"].cpu_us / each[what].cpu_us for each in rounds)
        wall = f"{statistics.median(speeds):,.0f} | {min(speeds):,.0f} | {max(speeds):,.0f} | {ratio:.2f}"
        print(f"| {what} | {wall} | {cpu:.0f} | {share:.2f} | |")


def find_source(folder: Path) -> tuple[Path, Prepare]:
    """Return a tree of images and the function that prepares it on a volume."""
    if given := os.environ.get("TANDEM_TINY_IMAGENET"):
        tree = Path(given)
        return tree, lambda volume: prepare_tiny_imagenet(volume, tree, "d", allow_missing=True, progress=stages)
    tree = write_pictures(folder / "source")
    return tree, lambda volume: prepare_image_folder(volume, tree, "d", progress=stages)


def write_pictures(tree: Path, num_classes: int = 20, each: int = 1000) -> Path:
    """Write JPEGs of random colours with smooth passages, as photographs have: about 2 kB each."""
    generator = np.random.default_rng(0)
    for name in (f"class{number:02d}" for number in range(num_classes)):
        (tree / name).mkdir(parents=True)
        for number in range(each):
            small = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(tree / name / f"{number:04d}.jpg", quality=80)
    return tree


def one_round(tree: Path, files: list[str], prepare: Prepare, folder: Path, cores: int) -> dict[str, Cost]:
    """Return what each costs."""
    some = files[:: max(len(files) // MOST_IMAGES, 1)]
    parts = [some[core::cores] for core in range(cores)]
    costs = {"decoder": together([Decode(tree, part) for part in parts])}
    warm(tree, some)
    costs["packing"] = together([Pack(tree, part, folder / f"rows{core}") for core, part in enumerate(parts)])
    warm(tree, files)
    stages.begin()
    cpu_s = processor_time()
    dataset = prepare(Volume(folder / "home"))
    cpu_s = processor_time() - cpu_s
    seconds = stages.end()
    count = sum(dataset.num_images.values())
    costs["whole"] = Cost(count, sum(seconds.values()), cpu_s)
    print(", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.items()))
    shutil.rmtree(folder / "home")
    return costs


def processor_time() -> float:
    """Return the seconds of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def warm(tree: Path, files: list[str]) -> None:
    """Read all files, so that they lie in the page cache, and write what waits to be written."""
    os.sync()
    for file in files:
        (tree / file).read_bytes()


class Stages:
    """A Progress that keeps the seconds of each stage."""

    def begin(self) -> None:
        """Start the clock."""
        self._at, self._stage = time.perf_counter(), "start"
        self._seconds: dict[str, float] = {}

    def start(self, description: str, total: int | None) -> None:  # noqa: ARG002
        """Begin a stage."""
        now = time.perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._at
        self._at, self._stage = now, description

    def advance(self, units: int = 1) -> None:
        """Ignore."""

    def end(self) -> dict[str, float]:
        """Return {stage: seconds}."""
        self.start("", None)
        return self._seconds


stages = Stages()


@dataclass(frozen=True)
class Decode:
    """PIL alone, on bytes in memory."""

    tree: Path
    files: list[str]

    def ready(self) -> Task:
        """Read the files and return the work to time."""
        encoded = [(self.tree / file).read_bytes() for file in self.files]

        def run() -> None:
            for data in encoded:
                np.asarray(Image.open(io.BytesIO(data)))

        return run


class PackingWriter(ImageWriter):
    """The writer of `data prepare` without its copies of the images."""

    def _write_file(self, path: str, data: bytes) -> None:
        pass


@dataclass(frozen=True)
class Pack:
    """Read, decode and write rows, as the processes of `data prepare` do."""

    tree: Path
    files: list[str]
    folder: Path

    def ready(self) -> Task:
        """Make the packed file and return the work to time."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / ".work").mkdir(parents=True)
        items = [Item(file, "", str(number), 0) for number, file in enumerate(self.files)]
        create_packed(self.folder, "train", len(items), (SIDE, SIDE))
        writer = PackingWriter(TreeSource(self.tree), self.folder, (SIDE, SIDE))
        chunks: list[Chunk] = chunks_of("train", items)

        def run() -> None:
            for chunk in chunks:
                writer.write(chunk)

        return run


def together(tasks: list[Decode] | list[Pack]) -> Cost:
    """Run the tasks side by side, each in a process of its own; return what they cost until the last is done."""
    context = multiprocessing.get_context("spawn")
    barrier, done = context.Barrier(len(tasks) + 1), context.Queue()
    processes = [context.Process(target=work, args=(task, barrier, done)) for task in tasks]
    for process in processes:
        process.start()
    barrier.wait()
    began = time.perf_counter()
    cpu_s = sum(done.get(timeout=600) for _ in tasks)
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return Cost(sum(len(task.files) for task in tasks), seconds, cpu_s)


def work(task: Decode | Pack, barrier: Barrier, done: "Queue[float]") -> None:
    """Get ready, wait for the others, run, and say how much processor time that took."""
    run = task.ready()
    barrier.wait()
    began = time.process_time()
    run()
    done.put(time.process_time() - began)


if __name__ == "__main__":
    main()
