"""Texts of 100 to 300 words by LSTM and Transformer: the server beside what one process writes without a server.

Both step texts together by the same code and take turns; ratios are taken turn by turn. They have the same cores, which
the client shares with the server.
"""

import math
import statistics

from benchmarks.serving.asked import Asked
from benchmarks.serving.plant import Server, publish_language_model, serving, volume
from benchmarks.serving.text_client import TextLoad, Written, drive

MODELS = ("LSTM", "Transformer")
STREAMS = (1, 8, 32)


def main(rounds: int, seconds: float) -> None:
    """Print a table a model."""
    with volume() as home:
        for model in MODELS:
            publish_language_model(home, model)
        with serving(home.home, *(model.lower() for model in MODELS)) as server:
            for model in MODELS:
                limit = Asked("benchmarks.serving.text_limit", home.home, model.lower())
                try:
                    _measure(model, limit, server, rounds, seconds)
                finally:
                    limit.stop()


def _measure(model: str, limit: Asked, server: Server, rounds: int, seconds: float) -> None:
    print(f"{model}, n = {rounds} rounds of {seconds:g} s\n")
    print(
        "| streams | in process, words/s | server, words/s | of it (target 0.85) | words a message "
        "| client, of a core | first word p50 ms | in steps (target 3 at 32) |\n|---|---|---|---|---|---|---|---|"
    )
    for streams in STREAMS:
        turns: list[tuple[float, float, Written]] = []
        for _ in range(rounds):
            rate, step_ms = limit.ask("rate", streams, seconds), limit.ask("step", streams, seconds / 2)
            turns.append((rate, step_ms, drive(TextLoad(server.address, model.lower(), streams, seconds))))
        _print(streams, turns)
    print(flush=True)


def _print(streams: int, turns: list[tuple[float, float, Written]]) -> None:
    rates = [seen.words / seen.seconds for _, _, seen in turns]
    ratios = [rate / limit for rate, (limit, _, _) in zip(rates, turns, strict=True)]
    firsts = [statistics.median(seen.firsts_ms or [math.nan]) for _, _, seen in turns]
    in_steps = [first / step_ms for first, (_, step_ms, _) in zip(firsts, turns, strict=True)]
    middle = statistics.median
    print(
        f"| {streams} | {middle(limit for limit, _, _ in turns):,.0f} | {middle(rates):,.0f} | "
        f"{middle(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{middle(seen.words / max(1, seen.messages) for _, _, seen in turns):.1f} | "
        f"{middle(seen.cpu_share for _, _, seen in turns):.2f} | {middle(firsts):.1f} | {middle(in_steps):.1f} |"
    )
