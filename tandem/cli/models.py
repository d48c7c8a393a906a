"""`tandem models`: what the registry on the volume holds."""

from typing import Any

import click

from tandem.checkpoints.card import parse_card
from tandem.checkpoints.files import MODEL_FILE, read_verified
from tandem.checkpoints.registry import Registry, describe
from tandem.cli.output import console, json_option, open_volume, print_json, table
from tandem.errors import TandemError

# Of many classes a person wants to see the first few.
_SHOWN_CLASSES = 10


@click.group()
def models() -> None:
    """Models of the registry: names, versions and aliases."""


@models.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List the models. --json prints an array of {name, kind, latest, aliases, versions, metrics}."""
    registry = Registry(open_volume())
    documents = []
    for name in registry.names():
        try:
            documents.append(describe(registry, name))
        except TandemError as error:
            # One damaged model must not hide the others.
            click.echo(f"tandem: {name}: {error}", err=True)
    if as_json:
        print_json(documents)
    elif not documents:
        click.echo("no models yet; 'tandem train … --name NAME' makes one")
    else:
        _print_models(documents)


def _print_models(documents: list[dict[str, Any]]) -> None:
    lines = table("model", "kind", "latest", "aliases", "metrics of the latest")
    for each in documents:
        aliases = ", ".join(f"{alias}={version}" for alias, version in sorted(each["aliases"].items()))
        kind = each["kind"].replace("_", " ")
        lines.add_row(each["name"], kind, str(each["latest"]), aliases, _metrics(each["metrics"]))
    console().print(lines)


@models.command()
@click.argument("reference", metavar="REF")
@json_option
def show(reference: str, as_json: bool) -> None:
    """Show one version: its card, where it comes from and how good it is. --json prints one object."""
    registry = Registry(open_volume())
    located = registry.resolve(reference)
    files = read_verified(located.checkpoint, (MODEL_FILE,), located.digest)
    card = parse_card(files[MODEL_FILE]).model_dump(mode="json")
    version = located.version
    document = {
        "name": version.name if version else None,
        "version": version.version if version else None,
        "aliases": _aliases(registry, version.name, version.version) if version else [],
        "created_at": version.created_at if version else None,
        "checkpoint": str(located.checkpoint),
        **card,
    }
    if as_json:
        print_json(document)
    else:
        _print_card(located.label, document)


def _aliases(registry: Registry, name: str, version: int) -> list[str]:
    return sorted(alias for alias, number in registry.aliases(name).items() if number == version)


def _print_card(label: str, document: dict[str, Any]) -> None:
    click.echo(label)
    for key, value in document.items():
        if value is None or value == [] or key in ("name", "version", "format_version"):
            continue
        click.echo(f"  {key.replace('_', ' '):<20} {_readable(key, value)}")


def _readable(key: str, value: Any) -> str:
    if key == "classes":
        words = [each["words"] for each in value]
        more = f", … ({len(words)} in all)" if len(words) > _SHOWN_CLASSES else ""
        return ", ".join(words[:_SHOWN_CLASSES]) + more
    if key == "metrics":
        return _metrics(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return f"{value:,}" if key == "num_parameters" else ", ".join(value) if isinstance(value, list) else str(value)


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
