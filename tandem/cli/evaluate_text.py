"""What `tandem evaluate` says and refuses of language models."""

from typing import Any

import click

from tandem.cli.output import console, table
from tandem.jobs.spec import DYNAMIC_DEFAULTS, TextEvaluationJob

CLASSIFIER_OPTIONS = frozenset({"flip", "batch_size", "top_k"})
TEXT_OPTIONS = frozenset(
    name
    for name in TextEvaluationJob.model_fields
    if name in ("mode", "window") or name.startswith(("cache_", "dynamic_"))
)
_LABELS = {"cache_": "  with the cache", "dynamic_": "  with dynamic evaluation"}


def default_of_rules(field: str) -> str:
    """Return the default of a field that each rule of dynamic evaluation has its own for."""
    return ", ".join(f"{values[field]:g} for {rule}" for rule, values in DYNAMIC_DEFAULTS.items())


def check_options(given: dict[str, Any], kind: str) -> None:
    """Raise UsageError for an option among `given` that does not go with a model of `kind`, or with --mode."""
    model, mode = given["model"], given.get("mode", "plain")
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if kind == "classifier" and name in TEXT_OPTIONS:
            raise click.UsageError(f"{option} is for language models; {model} is a classifier")
        if kind == "language_model" and name in CLASSIFIER_OPTIONS:
            hint = "; a text is read as one row, so that perplexity depends on no batch size" * (name == "batch_size")
            raise click.UsageError(f"{option} is for classifiers; {model} is a language model{hint}")
        if name.startswith(("cache_", "dynamic_")) and not name.startswith(mode):
            raise click.UsageError(f"{option} goes with --mode {name.partition('_')[0]}")
    if "dynamic_statistics" in given and given.get("dynamic_rule") == "sgd":
        raise click.UsageError("--dynamic-statistics goes with --dynamic-rule rms; sgd takes none")


def prefixes(mode: str) -> tuple[str, ...]:
    """Return the prefixes of what a mode says: of the model alone, and its own."""
    return ("",) if mode == "plain" else ("", f"{mode}_")


def print_text_report(document: dict[str, Any]) -> None:
    """Print what an evaluation found, as a table for people."""
    split, unknown = f"{document['dataset']}/{document['split']}", f"{document['num_unknown']:,} of them <unk>"
    click.echo(f"\non {document['num_tokens']:,} tokens of {split} ({unknown}; line ends count too):\n")
    lines = table("", "loss", "perplexity", "perplexity a word", "bits a byte")
    for prefix in prefixes(document["mode"]):
        lines.add_row(_LABELS.get(prefix, document["model"]), *_figures(document, prefix))
    console().print(lines)
    if document["parameters"]:
        values = (f"{name.partition('_')[2]} {value}" for name, value in document["parameters"].items())
        click.echo(f"\n{document['mode']}: {', '.join(values)}")
    click.echo()
    for prefix in prefixes(document["mode"]):
        click.echo(f"{prefix.replace('_', ' ')}losses of the tokens: {document[f'{prefix}token_losses']}")


def _figures(document: dict[str, Any], prefix: str) -> tuple[str, ...]:
    forms = {"loss": "{:.4f}", "ppl": "{:.2f}", "word_ppl": "{:.2f}", "bits_per_byte": "{:.4f}"}
    values = {name: document[f"{prefix}{name}"] for name in forms}
    return tuple("-" if value is None else forms[name].format(value) for name, value in values.items())
