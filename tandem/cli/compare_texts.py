"""`tandem compare run:A run:B` of two evaluations of language models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.calls import printable
from tandem.cli.output import console, open_volume, print_json, table

if TYPE_CHECKING:
    from tandem.comparison.text_evaluations import TextEvaluation, TokenDifference
    from tandem.comparison.token_differences import TokenComparison

# A person reads some; --json has more.
_SHOWN, _LISTED = 15, 100


def compare_texts(run_a: Path, run_b: Path, as_json: bool) -> None:
    """Compare the evaluations in two run directories, and print what was found."""
    from tandem.comparison.text_evaluations import compare_text_evaluations, read_text_evaluation

    a, b = read_text_evaluation(run_a), read_text_evaluation(run_b)
    found = compare_text_evaluations(a, b)
    tokens = _tokens(a, b, _LISTED if as_json else _SHOWN)
    if as_json:
        print_json(_document(a, b, found, tokens))
    else:
        _print(a, b, found, tokens)


def _tokens(a: "TextEvaluation", b: "TextEvaluation", count: int) -> "list[TokenDifference]":
    """Return the tokens that differ most, where the dataset is still on the volume, and still the same."""
    from tandem.checkpoints.files import VOCABULARY_FILE
    from tandem.comparison.text_evaluations import differing_tokens
    from tandem.data.manifest import read_dataset
    from tandem.data.vocabulary import Vocabulary
    from tandem.errors import TandemError

    volume = open_volume()
    directory = volume.dataset(a.dataset)
    try:
        if read_dataset(volume, a.dataset).fingerprint != a.facts["dataset_fingerprint"]:
            return []
        vocabulary = Vocabulary.from_json((directory / VOCABULARY_FILE).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, TandemError):
        return []
    return differing_tokens(a, b, directory, vocabulary, count)


def _document(
    a: "TextEvaluation", b: "TextEvaluation", found: "TokenComparison", tokens: "list[TokenDifference]"
) -> dict[str, Any]:
    from tandem.comparison.text_evaluations import verdict

    return {
        "num_tokens": found.num_tokens,
        "verdict": verdict(found, a.model, b.model),
        "a": {"model": a.model, "mode": a.mode, "loss": found.loss_a, "ppl": found.perplexity_a},
        "b": {"model": b.model, "mode": b.mode, "loss": found.loss_b, "ppl": found.perplexity_b},
        "difference": {"value": found.difference, "interval": [*found.interval] if found.has_interval else None},
        "ppl_ratio": {"value": found.share, "interval": [*found.ratio] if found.has_interval else None},
        "block_tokens": found.block_tokens,
        "tokens": [
            {
                "place": each.place,
                "before": each.before,
                "token": each.token,
                "loss_a": each.loss_a,
                "loss_b": each.loss_b,
            }
            for each in tokens
        ],
    }


def _print(a: "TextEvaluation", b: "TextEvaluation", found: "TokenComparison", tokens: "list[TokenDifference]") -> None:
    from tandem.comparison.text_evaluations import verdict

    lines = table("", "model", "mode", "loss", "perplexity")
    lines.add_row("a", a.model, a.mode, f"{found.loss_a:.4f}", f"{found.perplexity_a:.2f}")
    lines.add_row("b", b.model, b.mode, f"{found.loss_b:.4f}", f"{found.perplexity_b:.2f}")
    console().print(lines)
    click.echo()
    click.echo(verdict(found, a.model, b.model))
    if tokens:
        lines = table("token", "after", "a, nats", "b, nats")
        for each in tokens:
            lines.add_row(printable(each.token), printable(each.before), f"{each.loss_a:.2f}", f"{each.loss_b:.2f}")
        click.echo()
        console().print(lines)
