"""Swaps under load: a new version is published again and again while calls go on."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving.client import Load, drive, start
from benchmarks.serving.plant import Server, publish_classifier, serving, volume, write_classifier, write_jpegs
from tandem.client import Client
from tandem.volume import Volume

SWAPS = 50
# A version may take so long to come into service, beside calls for half of what the server can do.
EACH_S = 6.0
CALM_S = 40.0


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
    calm = drive(Load(server.address, str(images), CALM_S, rate=rate))
    before = server.resident_mib
    # They are trained and written elsewhere: what is measured is how a version comes into service.
    publishes = [write_classifier(home, run_id=f"resnet-{number + 2}") for number in range(SWAPS)]
    driving = start(Load(server.address, str(images), SWAPS * EACH_S, rate=rate))
    took = [_until_served(server, publish, version + 2) for version, publish in enumerate(publishes) if driving.goes_on]
    seen = driving.result()
    failed = sum(count for code, count in seen.codes.items() if code != "OK")
    print(
        f"{len(took)} versions at {rate:,.0f} calls/s, each in service after {statistics.median(took):.1f} s (median)"
    )
    print(f"failed calls: {failed} of {sum(seen.codes.values())} (target 0)")
    ratio = seen.percentile_ms(0.99) / calm.percentile_ms(0.99)
    print(
        f"p99: {seen.percentile_ms(0.99):.1f} ms, undisturbed {calm.percentile_ms(0.99):.1f} ms, ratio {ratio:.2f} "
        f"(target 2); p50: {seen.percentile_ms(0.5):.1f} against {calm.percentile_ms(0.5):.1f} ms"
    )
    print(f"resident: {before:.0f} MiB before, {server.resident_mib:.0f} MiB after")


def _until_served(server: Server, publish: Callable[[], object], version: int) -> float:
    """Publish a version; return how many seconds later it is the one that answers."""
    began = time.monotonic()
    publish()
    with Client(server.address) as client:
        while version not in client.list_models()[0].loaded:
            if time.monotonic() - began > 10 * EACH_S:
                raise SystemExit(f"version {version} did not come into service")
            time.sleep(0.1)
    took_s = time.monotonic() - began
    # One after another: what a swap does to calls is to be seen, not what two at once do.
    time.sleep(max(0.0, 1.0 - took_s))
    return took_s
