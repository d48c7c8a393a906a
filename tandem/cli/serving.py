"""What `tandem models` asks of a server: load, unload, alias and watch."""

from typing import TYPE_CHECKING, Any

import click

from tandem.cli.calls import open_client, version_document
from tandem.cli.output import json_option, open_volume, print_json

if TYPE_CHECKING:
    from tandem.wire.results import AliasMove, ModelChange, ModelInfo, ModelsSnapshot


@click.command()
@click.argument("reference", metavar="REF")
@json_option
def load(reference: str, as_json: bool) -> None:
    """Put model REF into service on the server and load it now. --json prints {model, load_ms}."""
    with open_client() as client:
        loaded = client.load_model(reference)
    if as_json:
        print_json({"model": version_document(loaded.model), "load_ms": loaded.load_ms})
    else:
        model = loaded.model
        click.echo(f"{model.label} ({model.architecture}, {model.dtype}) answers; {loaded.load_ms / 1000:.2f} s")


@click.command()
@click.argument("name")
@json_option
def unload(name: str, as_json: bool) -> None:
    """Take model NAME out of service and memory on the server, until `load`. --json prints {name, versions}."""
    with open_client() as client:
        versions = client.unload_model(name)
    if as_json:
        print_json({"name": name, "versions": list(versions)})
    else:
        there = ", ".join(map(str, versions)) or "none"
        click.echo(f"{name} is out of service; versions that were in memory: {there}")


@click.command()
@click.argument("name")
@click.argument("alias_", metavar="ALIAS")
@click.argument("version", type=click.IntRange(1), required=False)
@click.option("--delete", is_flag=True, help="Take the alias away.")
@click.option("--local", is_flag=True, help="Write to the volume of this machine, without a server.")
@json_option
def alias(name: str, alias_: str, version: int | None, delete: bool, local: bool, as_json: bool) -> None:
    """Point ALIAS of model NAME at VERSION: callers name it NAME@ALIAS. `latest` and `best` move by themselves.

    --json prints {name, aliases, previous_version}; previous_version is null for an alias that is new.
    """
    if (version is None) != delete:
        raise click.UsageError("give a VERSION, or --delete")
    aliases, previous = (_on_volume if local else _on_server)(name, alias_, version)
    if as_json:
        print_json({"name": name, "aliases": aliases, "previous_version": previous or None})
    else:
        before = f", before {name}:{previous}" if previous else ""
        now = f"is {name}:{version}" if version else "is gone"
        click.echo(f"{name}@{alias_} {now}{before}")


def _on_server(name: str, alias: str, version: int | None) -> tuple[dict[str, int], int]:
    with open_client() as client:
        move: AliasMove = client.set_alias(name, alias, version) if version else client.delete_alias(name, alias)
    return move.model.aliases, move.previous_version


def _on_volume(name: str, alias: str, version: int | None) -> tuple[dict[str, int], int]:
    from tandem.checkpoints.registry import Registry

    registry, by = Registry(open_volume()), "tandem models alias"
    before = registry.set_alias(name, alias, version, by) if version else registry.delete_alias(name, alias, by)
    return registry.aliases(name), before or 0


@click.command()
@json_option
def watch(as_json: bool) -> None:
    """Print the server's models, then each change as it happens, until Ctrl-C.

    --json prints a line for each: {"models": […]} first, and again where changes were missed; then {kind, name,
    version, alias, previous_version, reason}, the kind published, withdrawn, alias_set, alias_deleted, loaded, unloaded
    or failed.
    """
    from tandem.wire.results import ModelsSnapshot

    with open_client() as client:
        for update in client.watch_models():
            if isinstance(update, ModelsSnapshot):
                _print_models(update, as_json)
            elif as_json:
                print_json(vars(update))
            else:
                click.echo(_told(update))


def _print_models(snapshot: "ModelsSnapshot", as_json: bool) -> None:
    if as_json:
        print_json({"models": [_document(model) for model in snapshot.models]})
        return
    for model in snapshot.models:
        click.echo(_line(model))
    if not snapshot.models:
        click.echo("no models yet")


def _document(model: "ModelInfo") -> dict[str, Any]:
    return {**vars(model), "versions": list(model.versions), "loaded": list(model.loaded)}


def _line(model: "ModelInfo") -> str:
    aliases = ", ".join(f"{alias}={version}" for alias, version in sorted(model.aliases.items()))
    loaded = ", ".join(map(str, model.loaded)) or "none"
    failed = "".join(f"; {version} failed: {why}" for version, why in sorted(model.failed.items()))
    return f"{model.name}  {aliases}; loaded: {loaded}{failed}" + "; out of service" * model.out_of_service


def _told(change: "ModelChange") -> str:
    version = f"{change.name}:{change.version}" if change.version else change.name
    reason = f": {change.reason}" if change.reason else ""
    before = f", before {change.name}:{change.previous_version}" if change.previous_version else ""
    if change.kind == "alias_set":
        return f"{change.name}@{change.alias} is {version}{before}"
    if change.kind == "alias_deleted":
        return f"{change.name}@{change.alias} is gone{before}"
    return f"{version} {change.kind}{reason}"
