"""`tandem bench classify` and `generate`: an inference server beside what its machine can do without one."""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.access import OPEN
from tandem.cli.output import console, json_option, print_json, table
from tandem.local.state import find_system
from tandem.settings import Settings

if TYPE_CHECKING:
    from tandem.cli.bench_load import Seen, Target
    from tandem.cli.bench_processes import Limit

_BATCH = 32
_MANY = 32
_WORDS = 100
# Until the model is loaded and warm.
_LOAD_S = 120.0

ROUNDS = click.option(
    "--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Turns of limit and server."
)
SECONDS = click.option(
    "--seconds", type=click.FloatRange(0.2, 600), default=2.0, show_default=True, help="Of each measurement."
)
REFERENCE = click.argument("reference", required=False, default="")


@dataclass(frozen=True)
class Way:
    """One way to load the server: `limit` and `seen` each measure for some seconds."""

    name: str
    limit: Callable[[float], float]
    drive: Callable[[float], "Seen"]


@dataclass
class Row:
    """What the turns of one way gave."""

    name: str
    limits: list[float] = field(default_factory=list)
    turns: list["Seen"] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return the row as JSON: medians over the turns, percentiles over all calls; ratios are taken turn by turn."""
        from tandem.cli.bench_load import percentiles_ms

        ratios = [seen.items_per_s / limit for limit, seen in zip(self.limits, self.turns, strict=True)]
        document: dict[str, Any] = {
            "name": self.name,
            "per_s": statistics.median(seen.items_per_s for seen in self.turns),
            "limit_per_s": statistics.median(self.limits),
            "ratio": statistics.median(ratios),
            "num_calls": sum(len(seen.latencies) for seen in self.turns),
            **percentiles_ms([each for seen in self.turns for each in seen.latencies]),
            "client_cpu_share": statistics.median(seen.client_cpu_share for seen in self.turns),
        }
        for name in ("first_words", "between_words"):
            if waits := [each for seen in self.turns for each in getattr(seen, name)]:
                document[name] = percentiles_ms(waits)
        return document


@click.command()
@REFERENCE
@ROUNDS
@SECONDS
@json_option
def classify(reference: str, rounds: int, seconds: float, as_json: bool) -> None:
    """Images a second and latencies of a server, beside decode and network in one process without it.

    REFERENCE is a model of the registry, asked of the running server, or of one that is started for it. Without
    one a ResNet-18 with random weights is served: 64 px, 200 classes.
    """
    with _measured("classifier", reference) as (limit, target, images):
        from tandem.cli.bench_load import drive_images

        def way(name: str, batch: int, in_flight: int, alone: bool = False) -> Way:
            def measure(for_s: float) -> float:
                return 1000 / limit.measure("image", for_s) if alone else limit.measure("images", for_s, _BATCH)

            return Way(name, measure, lambda for_s: drive_images(target, images, batch, in_flight, for_s))

        ways = [
            way("1 image a call, 1 in flight", 1, 1, alone=True),
            way(f"1 image a call, {_MANY} in flight", 1, _MANY),
            way(f"{_BATCH} images a call, 4 in flight", _BATCH, 4),
        ]
        _report("images", limit.facts, _turns(ways, rounds, seconds, as_json), as_json)


@click.command()
@REFERENCE
@ROUNDS
@SECONDS
@click.option(
    "--words", type=click.IntRange(2, 10_000), default=_WORDS, show_default=True, help="Of each text of the load."
)
@json_option
def generate(reference: str, rounds: int, seconds: float, words: int, as_json: bool) -> None:
    """Words a second, and the waits for words, of a server beside the network's steps in one process without it.

    REFERENCE is a model of the registry, asked of the running server, or of one that is started for it. Without
    one an LSTM with random weights is served: 200 wide, 33,278 words.
    """
    with _measured("language_model", reference) as (limit, target, _):
        from tandem.cli.bench_load import drive_texts

        def way(texts: int) -> Way:
            return Way(
                f"{texts} {'text' if texts == 1 else 'texts'} at a time",
                lambda for_s: limit.measure("words", for_s, texts),
                lambda for_s: drive_texts(target, words, texts, for_s),
            )

        _report("words", limit.facts, _turns([way(1), way(8), way(_MANY)], rounds, seconds, as_json), as_json)


@contextlib.contextmanager
def _measured(kind: str, reference: str) -> "Iterator[tuple[Limit, Target, Path]]":
    """Yield the limit, the server with the model loaded, and the folder of images to send."""
    from tandem.cli.bench_load import Target
    from tandem.cli.bench_processes import limit_process, own_server
    from tandem.client import Client

    settings = Settings.from_environment()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-bench-")))
        home = settings.home if reference else scratch / "home"
        request = {"kind": kind, "home": str(home), "reference": reference, "images": str(scratch / "images")}
        devices = {"device": settings.device, "engine": settings.engine, "precision": settings.precision}
        limit = stack.enter_context(limit_process({**request, **devices}))
        running = find_system(settings).inference_address if reference else None
        address = running or stack.enter_context(own_server(home, scratch))
        target = Target(address, settings.client_access if running else OPEN, reference or "bench")
        with Client(address, _LOAD_S, target.access) as client:
            client.get_model(target.model)
        yield limit, target, scratch / "images"


def _turns(ways: list[Way], rounds: int, seconds: float, as_json: bool) -> list[Row]:
    rows = [Row(way.name) for way in ways]
    for number in range(rounds):
        for way, row in zip(ways, rows, strict=True):
            if not as_json:
                click.echo(f"round {number + 1} of {rounds}: {way.name} …", err=True)
            row.limits.append(way.limit(seconds))
            row.turns.append(way.drive(seconds))
    return rows


def _report(unit: str, facts: dict[str, Any], rows: list[Row], as_json: bool) -> None:
    machine = {name: each for name, each in facts.items() if name != "type"}
    documents = [row.document() for row in rows]
    if as_json:
        print_json({"machine": machine, "unit": unit, "rows": documents})
        return
    echo = console().print
    echo(f"{facts['model']}: {facts['architecture']} in {facts['dtype']}, in process by {facts['runtime']}")
    echo(f"{facts['cpu_cores']} CPU cores, torch {facts['torch']}", *(f", {name}" for name in facts["gpus"]), sep="")
    waits = [name for name in ("first_words", "between_words") if any(name in each for each in documents)]
    result = table(
        "load", f"{unit}/s", "limit's", "ratio", "p50 ms", "p95 ms", "p99 ms", "calls", "client, of a core",
        *(f"{name.replace('_', ' ')}: p50, p99 ms" for name in waits),
    )  # fmt: skip
    for each in documents:
        result.add_row(*_cells(each), *(_wait(each.get(name, {})) for name in waits))
    echo()
    echo(result)
    echo()
    echo(f"limit: {unit}/s of one process without a server; it and the server took turns, and shared the cores with us")
    echo("ratio: median of the turns; p50 … p99: of all calls; client: what this command took of a core meanwhile")


def _cells(row: dict[str, Any]) -> list[str]:
    percentiles = [f"{row[name]:,.1f}" if name in row else "-" for name in ("p50_ms", "p95_ms", "p99_ms")]
    rates = [f"{row['per_s']:,.0f}", f"{row['limit_per_s']:,.0f}", f"{row['ratio']:.2f}"]
    return [row["name"], *rates, *percentiles, f"{row['num_calls']:,}", f"{row['client_cpu_share']:.2f}"]


def _wait(percentiles: dict[str, float]) -> str:
    return f"{percentiles['p50_ms']:,.1f}, {percentiles['p99_ms']:,.1f}" if percentiles else "-"
