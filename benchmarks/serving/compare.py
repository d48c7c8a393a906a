"""CompareDataset of two ResNet-18 on JPEGs of 64×64, beside what one process needs for the bare work on the same files:
each read and decoded once, and both networks run on it.

The two take turns on the same cores, and ratios are taken turn by turn. Both run eager torch in float32 on batches of
the server's size. The networks have random weights and name different classes for nearly all images, so the server
ranks, weighs and sends as much as it ever does. TANDEM_BENCH_IMAGES (10000) shortens a look.
"""

import json
import os
import statistics
import time

from benchmarks.runtimes import NUM_CLASSES
from benchmarks.serving.asked import Asked
from benchmarks.serving.plant import publish_classifier, serving, volume, write_jpegs
from tandem.client import Client, Comparison
from tandem.data.manifest import ClassName, ImageDataset
from tandem.volume import Volume, to_json

DATASET, TARGET = "made-up", 1.10


def main(rounds: int, seconds: float) -> None:
    """Print the table; a round is as long as the images take, whatever `seconds` says."""
    del seconds
    num_images = int(os.environ.get("TANDEM_BENCH_IMAGES", "10000"))
    with volume() as home:
        for seed, name in enumerate(("one", "other")):
            publish_classifier(home, name, f"{name}-1", seed)
        write_dataset(home, num_images)
        with serving(home.home, "one", "other") as server, Client(server.address) as client:
            limit = Asked("benchmarks.serving.compare_limit", home.dataset(DATASET))
            try:
                # Both warm: kernels chosen, and the files in the page cache.
                took(client, num_images), limit.ask("pass")
                _print([(limit.ask("pass"), took(client, num_images)) for _ in range(rounds)], num_images)
            finally:
                limit.stop()


def write_dataset(home: Volume, num_images: int) -> None:
    """Write a prepared dataset of one split, `val`, whose images follow the classes in turn."""
    directory = home.dataset(DATASET)
    directory.mkdir(parents=True)
    files = sorted(path.name for path in write_jpegs(directory / "val", num_images).iterdir())
    rows = [json.dumps({"file": f"val/{file}", "label": place % NUM_CLASSES}) for place, file in enumerate(files)]
    (directory / "index").mkdir()
    (directory / "index" / "val.jsonl").write_text("\n".join(rows) + "\n")
    classes = tuple(ClassName(id=f"n{number:08}", words=f"class {number}") for number in range(NUM_CLASSES))
    manifest = ImageDataset(
        name=DATASET, fingerprint="0" * 64, source="made up", classes=classes, num_images={"val": num_images}
    )
    (directory / "dataset.json").write_bytes(to_json(manifest.model_dump(mode="json")))


def took(client: Client, num_images: int) -> float:
    """Return the seconds of a comparison of all images."""
    began = time.perf_counter()
    *_, answer = client.compare_dataset("one", "other", DATASET)
    elapsed_s = time.perf_counter() - began
    if not isinstance(answer, Comparison) or answer.summary.num_images != num_images:
        raise RuntimeError(f"the comparison is not of {num_images} images: {answer}")
    return elapsed_s


def _print(turns: list[tuple[float, float]], num_images: int) -> None:
    print(f"| {num_images:,} images, both models | s | images/s | n = {len(turns)} rounds |\n|---|---|---|---|")
    for name, each in zip(("bare work in one process", "CompareDataset"), zip(*turns, strict=True), strict=True):
        median = statistics.median(each)
        print(f"| {name} | {median:.2f} | {num_images / median:,.0f} | |")
    ratios = [server / limit for limit, server in turns]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"\nCompareDataset takes {statistics.median(ratios):.3f} times as long ({spread}; target {TARGET:.2f}).")
