"""Swaps under load: a new version is published again and again while calls go on."""

import time
from pathlib import Path

from benchmarks.serving.client import Load, drive, start
from benchmarks.serving.plant import Server, publish_classifier, serving, volume, write_classifier, write_jpegs
from tandem.client import Client
from tandem.volume import Volume

SWAPS = 50
EACH_S = 1.5


def main(rounds: int, seconds: float) -> None:
    """Print what the callers saw."""
    del rounds
    with volume() as home:
        publish_classifier(home)
        images = write_jpegs(home.home / "jpegs")
        with serving(home.home, "resnet") as server:
            _measure(home, server, images, seconds)


def _measure(home: Volume, server: Server, images: Path, seconds: float) -> None:
    # Half of what it can: a swap needs some of the processor too.
    rate = drive(Load(server.address, str(images), seconds, in_flight=32)).calls_per_s / 2
    calm = drive(Load(server.address, str(images), SWAPS * EACH_S / 2, rate=rate))
    before = server.resident_mib
    # They are trained and written elsewhere: what is measured is how a version comes into service.
    publishes = [write_classifier(home, run_id=f"resnet-{number + 2}") for number in range(SWAPS)]
    driving = start(Load(server.address, str(images), SWAPS * EACH_S, rate=rate))
    for publish in publishes:
        publish()
        time.sleep(EACH_S)
    seen = driving.result()
    with Client(server.address) as client:
        (model,) = client.list_models()
    failed = sum(count for code, count in seen.codes.items() if code != "OK")
    print(f"{SWAPS} versions published at {rate:,.0f} calls/s; the newest is {model.latest}, loaded are {model.loaded}")
    print(f"failed calls: {failed} of {sum(seen.codes.values())} (target 0)")
    ratio = seen.percentile_ms(0.99) / calm.percentile_ms(0.99)
    print(
        f"p99: {seen.percentile_ms(0.99):.1f} ms, undisturbed {calm.percentile_ms(0.99):.1f} ms, ratio {ratio:.2f} "
        f"(target 2); p50: {seen.percentile_ms(0.5):.1f} against {calm.percentile_ms(0.5):.1f} ms"
    )
    print(f"resident: {before:.0f} MiB before, {server.resident_mib:.0f} MiB after")
