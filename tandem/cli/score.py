"""`tandem score`: how likely texts are to a language model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.calls import open_client, printable, version_document
from tandem.cli.output import console, json_option, print_json, table
from tandem.errors import InvalidRequest

if TYPE_CHECKING:
    from tandem.wire.results import ScoreSummary, Scoring, TextScore, TokenScore


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--file", metavar="FILE", type=click.Path(path_type=Path), help="Score the text of a UTF-8 file.")
@click.option("--alternatives", type=click.IntRange(0, 20), default=0, help="Likeliest tokens in the place of each.")
@click.option("--tokens", is_flag=True, help="Print each token too; --alternatives does.")
@click.option("--first-given", is_flag=True, help="Do not score the first token, as `tandem evaluate` reads a split.")
@json_option
def score(
    reference: str,
    texts: tuple[str, ...],
    file: Path | None,
    alternatives: int,
    tokens: bool,
    first_given: bool,
    as_json: bool,
) -> None:
    """Say how likely each TEXT, or that of a file, is to language model REF: perplexity, and nats a token.

    A text begins after an end of line, as a generated one does. Words that the model does not know are scored as <unk>,
    and named. For texts over the server's limits there is `tandem evaluate`.

    --json prints {model, results: [{tokens: [{token, token_id, log_probability, alternatives}], unknown_words,
    num_tokens, sum_log_probability, mean_log_probability, perplexity, num_unknown}], summary, timings}.
    """
    if bool(texts) == (file is not None):
        raise click.UsageError("give a TEXT or more, or --file")
    given = texts if file is None else (_read(file),)
    with open_client() as client:
        answer = client.score(reference, given, alternatives, first_given)
    if as_json:
        _print_document(answer)
    else:
        _print(answer, with_tokens=tokens or alternatives > 0)


def _read(path: Path) -> str:
    try:
        # Line ends stay as they are: the model's reading of them is the server's matter.
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{printable(path)} is no UTF-8 text, at byte {error.start}") from None
    except OSError as error:
        raise InvalidRequest(f"can't read {printable(path)}: {error.strerror}") from None


def _print_document(answer: "Scoring") -> None:
    results = [
        {
            "tokens": [_token_document(token) for token in result.tokens],
            "unknown_words": list(result.unknown_words),
            **_summary_document(result.summary),
        }
        for result in answer.results
    ]
    timings = {"queue_ms": answer.timings.queue_ms, "compute_ms": answer.timings.compute_ms}
    summary = _summary_document(answer.summary)
    print_json({"model": version_document(answer.model), "results": results, "summary": summary, "timings": timings})


def _token_document(token: "TokenScore") -> dict[str, Any]:
    return {
        "token": token.token,
        "token_id": token.token_id,
        "log_probability": token.log_probability,
        "alternatives": [vars(each) for each in token.alternatives],
    }


def _summary_document(summary: "ScoreSummary") -> dict[str, Any]:
    return {
        "num_tokens": summary.num_tokens,
        "sum_log_probability": summary.sum_log_probability,
        "mean_log_probability": summary.mean_log_probability,
        "perplexity": summary.perplexity,
        "num_unknown": summary.num_unknown,
    }


def _print(answer: "Scoring", with_tokens: bool) -> None:
    click.echo(f"{answer.model.label} ({answer.model.architecture}, {answer.model.dtype})")
    for number, result in enumerate(answer.results, 1):
        name = f"text {number}: " if len(answer.results) > 1 else ""
        click.echo(name + _figures(result.summary))
        if result.unknown_words:
            click.echo(f"not in the vocabulary: {', '.join(result.unknown_words)}", err=True)
        if with_tokens:
            _print_tokens(result)
    if len(answer.results) > 1:
        click.echo(f"together: {_figures(answer.summary)}")


def _figures(summary: "ScoreSummary") -> str:
    unknown = f", {summary.num_unknown:,} of them <unk>" if summary.num_unknown else ""
    return (
        f"perplexity {summary.perplexity:.2f}, {-summary.mean_log_probability:.4f} nats a token, "
        f"{summary.num_tokens:,} tokens{unknown}"
    )


def _print_tokens(result: "TextScore") -> None:
    lines = table("token", "log p", "likeliest")
    for token in result.tokens:
        likeliest = ", ".join(f"{each.token} {each.log_probability:.2f}" for each in token.alternatives)
        lines.add_row(token.token, f"{token.log_probability:.2f}", likeliest)
    console().print(lines)
