"""`tandem models`: what the registry on the volume holds, and its models as files."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tandem.checkpoints.card import parse_card
from tandem.checkpoints.files import MODEL_FILE, NETWORK_FILE, read_verified
from tandem.checkpoints.registry import Registry, describe
from tandem.cli.export import export
from tandem.cli.output import console, json_option, open_registry, print_json, table
from tandem.cli.promote import promote, rollback
from tandem.cli.serving import alias, load, unload, watch
from tandem.cli.shadow import shadow
from tandem.errors import TandemError
from tandem.models.layers import Layer, from_json, shapes_text, total_parameters

if TYPE_CHECKING:
    from rich.table import Table

# Of many classes a person wants to see the first few.
_SHOWN_CLASSES = 10
# Characters; wider than any table.
_UNWRAPPED = 10_000


@click.group()
def models() -> None:
    """Models of the registry: names, versions and aliases."""


for command in (export, promote, rollback, load, unload, alias, shadow, watch):
    models.add_command(command)


@models.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List the models. --json prints an array of {name, kind, latest, aliases, versions, metrics}."""
    registry = open_registry()
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
    """Show one version: its card, where it comes from, how good it is, and its network as a table of layers.

    B in a shape is the batch size. --json prints one object; its `layers` are [{name, type, input, output,
    num_parameters, num_shared, num_calls}], null for a checkpoint that was saved without them.
    """
    registry = open_registry()
    located = registry.resolve(reference)
    files = read_verified(located.checkpoint, (MODEL_FILE, NETWORK_FILE), located.digest)
    layers = from_json(files[NETWORK_FILE]) if NETWORK_FILE in files else None
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
        print_json({**document, "layers": None if layers is None else [asdict(layer) for layer in layers]})
    else:
        _print_card(located.label, document)
        if layers is not None:
            click.echo()
            _print_layers(layers)


def _aliases(registry: Registry, name: str, version: int) -> list[str]:
    return sorted(alias for alias, number in registry.aliases(name).items() if number == version)


def _print_card(label: str, document: dict[str, Any]) -> None:
    click.echo(label)
    for key, value in document.items():
        if value is None or value == [] or key in ("name", "version", "format_version"):
            continue
        click.echo(f"  {key.replace('_', ' '):<20} {_readable(key, value)}")


def _print_layers(layers: list[Layer]) -> None:
    screen = console()
    whole = _layer_table(layers, [(layer.name or "(network)", layer) for layer in layers])
    # Names such as features.denseblock1.denselayer16.norm1 leave no room for the rest on a narrow terminal. A table's
    # own measure stops at the width that it is offered.
    is_too_wide = screen.measure(whole, options=screen.options.update(width=_UNWRAPPED)).maximum > screen.width
    screen.print(_layer_table(layers, list(_tree(layers))) if is_too_wide else whole)


def _tree(layers: list[Layer]) -> Iterator[tuple[str, Layer | None]]:
    """Yield each layer by the last part of its name, indented below the modules around it."""
    shown = {""}
    for layer in layers:
        parts = layer.name.split(".")
        for depth in range(1, len(parts)):
            if (around := ".".join(parts[:depth])) not in shown:
                shown.add(around)
                yield "  " * (depth - 1) + parts[depth - 1], None
        shown.add(layer.name)
        yield "  " * (len(parts) - 1) + (parts[-1] or "(network)"), layer


def _layer_table(layers: list[Layer], rows: list[tuple[str, Layer | None]]) -> "Table":
    lines = table("layer", "type", "input", "output", "parameters")
    lines.columns[-1].justify = "right"
    for name, layer in rows:
        lines.add_row(name, *(_cells(layer) if layer else ()))
    lines.add_row(f"{len(layers)} layers", "", "", "", f"{total_parameters(layers):,}", style="bold")
    return lines


def _cells(layer: Layer) -> tuple[str, str, str, str]:
    times = f" ×{layer.num_calls}" if layer.num_calls > 1 else ""
    return layer.type + times, shapes_text(layer.input), shapes_text(layer.output), _parameters(layer)


def _parameters(layer: Layer) -> str:
    shared = f"{layer.num_shared:,} shared" if layer.num_shared else ""
    own = f"{layer.num_parameters:,}" if layer.num_parameters else ""
    return " + ".join(part for part in (own, shared) if part)


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
