"""`tandem models promote` and `rollback`: an alias moves only where a comparison shows that it may."""

import getpass
import json
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.output import json_option, open_registry, print_json
from tandem.comparison.evidence import ALPHA
from tandem.errors import Conflict
from tandem.jobs.promotion_spec import PROMOTION_FILE

if TYPE_CHECKING:
    from tandem.checkpoints.promotion import Decision, Gate
    from tandem.checkpoints.registry import Version
    from tandem.comparison.results import ComparisonSummary

_METRICS = {"classifier": "acc1", "language_model": "ppl"}


@click.command()
@click.argument("reference", metavar="NAME:VERSION")
@click.option("--to", "alias", required=True, metavar="ALIAS", help="The alias to move, such as production.")
@click.option("--if-better-than", "against", metavar="NAME@ALIAS", help="What it must beat.  [default: who has ALIAS]")
@click.option("--on", "dataset", metavar="D", help="The dataset of the server's volume to compare on.")
@click.option("--split", help="The split of --on.  [default: val; of a text test, or valid if it has no test]")
@click.option("--metric", type=click.Choice(["acc1", "ppl"]), help="What must be better: acc1 of images, ppl of text.")
@click.option(
    "--min-gain",
    type=float,
    default=0.0,
    show_default=True,
    help="The least gain found: of acc1, or the share by which ppl falls; 0 to 1.",
)
@click.option("--alpha", type=float, default=ALPHA, show_default=True, help="The level of the paired test.")
@json_option
def promote(
    reference: str,
    alias: str,
    against: str | None,
    dataset: str | None,
    split: str | None,
    metric: str | None,
    min_gain: float,
    alpha: float,
    as_json: bool,
) -> None:
    """Point ALIAS at a version, if it is better than what it is to beat.

    Two classifiers are compared by the server on a labelled split, and McNemar's mid-p decides; two language models by
    the trainer, as a run, and the interval of the difference of their losses decides. The decision, its evidence and
    who asked for it are added to the model's history, also where the alias stays; then the exit code is 1. An alias
    that nobody has goes to the version at once. --json prints {name, alias, version, previous_version, promoted,
    reason, evidence}.
    """
    from tandem.checkpoints.promotion import Gate, carry_out, decide, opponent, without_comparison
    from tandem.checkpoints.registry import check_alias
    from tandem.jobs.promotion_checks import check_version

    gate = Gate(min_gain, alpha)
    check_alias(alias)
    registry = open_registry()
    candidate = check_version(registry, reference, "NAME:VERSION")
    against = opponent(candidate.name, alias, against)
    if metric not in (None, _METRICS[candidate.kind]):
        raise click.UsageError(f"--metric: a {candidate.kind.replace('_', ' ')} has {_METRICS[candidate.kind]}")
    before = registry.aliases(candidate.name).get(alias)
    decision = without_comparison(candidate.version, before, against)
    if decision is None:
        beaten = check_version(registry, against or f"{candidate.name}:{before}", "--if-better-than")
        if beaten == candidate:
            raise Conflict(f"{candidate.name}:{candidate.version} is what it is to beat")
        if not dataset:
            raise click.UsageError("give --on, the dataset to compare on")
        if candidate.kind == "classifier":
            split = split or "val"
            decision = decide(_compare(beaten, candidate, dataset, split), gate, f"{dataset}/{split}")
    if decision is not None:
        carry_out(registry, candidate.name, alias, candidate.version, before, decision, _who())
    else:
        decision, before = _by_a_run(candidate, alias, against, str(dataset), split, gate)
    _say(candidate, alias, before, decision.passes, decision.reason, decision.evidence or None, as_json)
    if not decision.passes:
        raise Conflict(f"{candidate.name}@{alias} stays where it is: {decision.reason}")


@click.command()
@click.argument("name")
@click.option("--of", "alias", default="production", show_default=True, help="The alias to move back.")
@json_option
def rollback(name: str, alias: str, as_json: bool) -> None:
    """Point an alias of model NAME where it was before its last move. --json prints {name, alias, version,
    previous_version}."""
    from tandem.checkpoints.promotion import roll_back

    previous, version = roll_back(open_registry(), name, alias, _who())
    if as_json:
        print_json({"name": name, "alias": alias, "version": version, "previous_version": previous})
    else:
        click.echo(f"{name}@{alias} is {name}:{version} again, after {name}:{previous}")


def _compare(beaten: "Version", candidate: "Version", dataset: str, split: str) -> "ComparisonSummary":
    from tandem.cli.calls import open_client
    from tandem.cli.compare import on_dataset

    # By their numbers: an alias might move meanwhile.
    references = tuple(f"{each.name}:{each.version}" for each in (beaten, candidate))
    with open_client() as client:
        return on_dataset(client, (references[0], references[1]), dataset, split, 5, 0).summary


def _by_a_run(
    candidate: "Version", alias: str, against: str | None, dataset: str, split: str | None, gate: "Gate"
) -> "tuple[Decision, int | None]":
    """Have the trainer compare two language models, and move the alias; return what it decided, and who had it."""
    from tandem.checkpoints.promotion import Decision
    from tandem.cli.connections import celery_app, job_store
    from tandem.cli.follow import follow_run
    from tandem.jobs.spec import make_spec
    from tandem.jobs.submit import submit
    from tandem.settings import Settings
    from tandem.volume import Volume

    settings = Settings.from_environment()
    volume, store = Volume(settings.home, settings.checkpoint_store), job_store(settings)
    # Whoever has the alias when the comparison begins is what is to be beaten, unless another was named.
    values = {"model": f"{candidate.name}:{candidate.version}", "against": against, "alias": alias}
    values |= {"dataset": dataset, "split": split}
    spec = make_spec({"kind": "promote_language_model", **values, "min_gain": gate.min_gain, "alpha": gate.alpha})
    record = submit(spec, volume, store, celery_app(settings))
    if not follow_run(record.run_id, volume, store, quiet=True).state.is_terminal:
        raise Conflict(f"run {record.run_id} has decided nothing yet; 'tandem runs resume {record.run_id}' goes on")
    found = json.loads((volume.run(record.run_id) / PROMOTION_FILE).read_bytes())
    return Decision(found["promoted"], found["reason"], found["evidence"] or {}), found["previous_version"]


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _say(
    candidate: "Version",
    alias: str,
    before: int | None,
    promoted: bool,
    reason: str,
    evidence: dict[str, Any] | None,
    as_json: bool,
) -> None:
    if as_json:
        facts = {"name": candidate.name, "alias": alias, "version": candidate.version, "previous_version": before}
        print_json({**facts, "promoted": promoted, "reason": reason, "evidence": evidence})
    elif promoted:
        was = f", before {candidate.name}:{before}" if before else ""
        click.echo(f"{candidate.name}@{alias} is {candidate.name}:{candidate.version}{was}: {reason}")
