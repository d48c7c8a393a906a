"""ResNet-18, 200 classes, JPEGs of 64×64 in, the best five out: the server beside the limit of its machine.

Limit, server and the plain server take turns, and ratios are taken turn by turn. All have the same cores; what the
client took of them is said, and is in none of the figures.
"""

import statistics
from pathlib import Path

from benchmarks.serving.asked import Asked
from benchmarks.serving.client import Load, Seen, drive
from benchmarks.serving.plant import Server, publish_classifier, serving, volume, write_jpegs

# Of the limit: its best batch is looked for once.
BATCHES = (8, 16, 32, 64)
TARGETS = {"32 images a message": 0.95, "1 image a message, 32 in flight": 0.85}

Turn = dict[str, float]


def main(rounds: int, seconds: float) -> None:
    """Print the tables."""
    with volume() as home:
        publish_classifier(home)
        images = write_jpegs(home.home / "jpegs")
        plain = ("-m", "benchmarks.serving.plain_server")
        with serving(home.home, "resnet") as ours, serving(home.home, command=plain) as theirs:
            limit = Asked("benchmarks.serving.limit", images)
            try:
                _measure(limit, ours, theirs, images, rounds, seconds)
            finally:
                limit.stop()


def _measure(limit: Asked, ours: Server, theirs: Server, images: Path, rounds: int, seconds: float) -> None:
    runtime = limit.line()
    rates = {batch: limit.ask("rate", batch, seconds) for batch in BATCHES}
    best = max(rates, key=lambda batch: rates[batch])
    print(f"runtime {runtime}; the limit is measured with batches of {best}\n")
    turns: list[Turn] = []
    shares: dict[str, list[float]] = {}

    def seen(name: str, server: Server, batch: int, in_flight: int) -> Seen:
        seen = drive(Load(server.address, str(images), seconds, batch, in_flight))
        shares.setdefault(name, []).append(seen.cpu_share)
        if set(seen.codes) != {"OK"}:
            raise RuntimeError(f"{name}: {seen.codes}")
        return seen

    for _ in range(rounds):
        turn = {"limit": limit.ask("rate", best, seconds), "in process": limit.ask("latency", seconds)}
        turn["32 images a message"] = 32 * seen("32 images a message", ours, 32, 4).calls_per_s
        many = "1 image a message, 32 in flight"
        turn[many] = seen(many, ours, 1, 32).calls_per_s
        turn["plain server, 32 in flight"] = seen("plain server, 32 in flight", theirs, 1, 32).calls_per_s
        turn["one call in flight"] = seen("one call in flight", ours, 1, 1).percentile_ms(0.5)
        turns.append(turn)
    _print(turns, shares)


def _print(turns: list[Turn], shares: dict[str, list[float]]) -> None:
    print(
        f"| | images/s | of the limit | target | client, of a core | n = {len(turns)} rounds |\n"
        "|---|---|---|---|---|---|"
    )
    for name in ("limit", *TARGETS, "plain server, 32 in flight"):
        share = f"{statistics.median(shares[name]):.2f}" if name in shares else ""
        ratio = _spread([turn[name] / turn["limit"] for turn in turns])
        print(f"| {name} | {_median(turns, name):,.0f} | {ratio} | {TARGETS.get(name, '')} | {share} | |")
    faster = _spread([turn["1 image a message, 32 in flight"] / turn["plain server, 32 in flight"] for turn in turns])
    print(f"\nAgainst the plain server, single images, 32 in flight: {faster} times (target 1.5).")
    more = _spread([turn["one call in flight"] - turn["in process"] for turn in turns])
    print(f"One image, one call in flight: p50 {_median(turns, 'one call in flight'):.2f} ms, in process ", end="")
    print(f"{_median(turns, 'in process'):.2f} ms, {more} ms more (target 0.6).")


def _median(turns: list[Turn], name: str) -> float:
    return statistics.median(turn[name] for turn in turns)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
