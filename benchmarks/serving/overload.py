"""Three times as many calls as the server can answer: what it answers in time, and what it takes of memory."""

import statistics
from pathlib import Path

from benchmarks.serving.client import Load, drive, start
from benchmarks.serving.plant import Server, publish_classifier, serving, volume, write_jpegs

DEADLINE_S = 0.5
TIMES = 3.0


def main(rounds: int, seconds: float) -> None:
    """Print the table."""
    with volume() as home:
        publish_classifier(home)
        images = write_jpegs(home.home / "jpegs")
        with serving(home.home, "resnet") as server:
            _measure(server, images, rounds, seconds)


def _measure(server: Server, images: Path, rounds: int, seconds: float) -> None:
    print(f"| round | peak calls/s | at {TIMES:g} × the rate | goodput of peak | p99 ms | codes | MiB before, after |")
    print("|---|---|---|---|---|---|---|")
    ratios = []
    for number in range(rounds):
        # Closed, with as many in flight as keep it busy within the deadline.
        peak = drive(Load(server.address, str(images), seconds, in_flight=64)).calls_per_s
        before = server.resident_mib
        seen = start(Load(server.address, str(images), 2 * seconds, rate=TIMES * peak, deadline_s=DEADLINE_S)).result()
        in_time = sum(each <= DEADLINE_S * 1000 for each in seen.latencies_ms) / seen.seconds
        ratios.append(in_time / peak)
        codes = ", ".join(f"{code} {count}" for code, count in sorted(seen.codes.items()))
        print(
            f"| {number + 1} | {peak:,.0f} | {in_time:,.0f} | {ratios[-1]:.2f} | {seen.percentile_ms(0.99):.0f} | "
            f"{codes} | {before:.0f}, {server.resident_mib:.0f} |"
        )
    print(f"\nGoodput of peak: median {statistics.median(ratios):.2f} (target 0.9); deadline {DEADLINE_S * 1000:g} ms.")
