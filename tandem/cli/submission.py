"""From the options of `tandem train` to runs: one, a sweep of them, and what follows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.links import Links, submit_links, take_links
from tandem.cli.output import print_json
from tandem.cli.scheduling import take_scheduling
from tandem.cli.sweep import follow_sweep, parse_sweeps, sweep_jobs
from tandem.errors import InvalidJob
from tandem.jobs.scheduling import Scheduling
from tandem.jobs.spec import make_spec

if TYPE_CHECKING:
    from celery import Celery

    from tandem.jobs.spec import JobSpec
    from tandem.jobs.store import JobStore
    from tandem.volume import Volume


@dataclass(frozen=True)
class Wish:
    """What is to be done with the spec, beside training."""

    scheduling: Scheduling
    links: Links
    follow: bool
    as_json: bool


def submit_training(kind: str, network: str, *, show_spec: bool = False, **values: Any) -> None:
    """Submit a run of `kind` with the options' values, or a sweep; `network` is the field that names it in words."""
    given = {name: value for name, value in values.items() if value is not None}
    swept = parse_sweeps(given.pop("sweeps", ()), click.get_current_context().command)
    max_parallel = given.pop("max_parallel", None)
    if max_parallel and not swept:
        raise click.UsageError("--max-parallel is of a --sweep")
    links = take_links(given)
    follow, as_json = given.pop("follow", False), given.pop("as_json", False)
    wish = Wish(take_scheduling(given), links, follow, as_json)

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {"model_name": f"{values['dataset']}-{values.get(network)}".lower()[:64], "kind": kind, **values}

    try:
        spec = make_spec(named({**given, **{field: options[0] for field, options in swept.items()}}))
        sweep = sweep_jobs(given, swept, named, wish.scheduling, max_parallel) if swept else None
    except InvalidJob as error:
        raise click.UsageError(str(error)) from None
    if show_spec:
        click.echo(spec.model_dump_json(indent=None if as_json else 1))
    elif sweep:
        _queue_sweep(*sweep, wish)
    else:
        _queue(spec, str(given[network]), wish)


def _connected() -> "tuple[Volume, JobStore, Celery]":
    from tandem.cli.connections import celery_app, job_store
    from tandem.settings import Settings
    from tandem.volume import Volume

    settings = Settings.from_environment()
    return Volume(settings.home, settings.checkpoint_store), job_store(settings), celery_app(settings)


def _queue(spec: "JobSpec", network: str, wish: Wish) -> None:
    from tandem.cli.follow import follow_run
    from tandem.jobs.submit import submit

    volume, store, app = _connected()
    wish.links.check(spec, volume)
    record = submit(spec, volume, store, app, wish.scheduling)
    (linked,) = submit_links([(spec, record)], wish.links, wish.scheduling, volume, store, app)
    if wish.as_json:
        print_json({"run_id": record.run_id, **linked.document()})
    else:
        click.echo(
            f"run {record.run_id} is {record.state.lower()}: {network} on {spec.dataset}, to become model "
            f"{spec.model_name!r}"
        )
        if linked.evaluation is not None:
            click.echo(
                f"run {linked.evaluation.run_id} evaluates it on {wish.links.evaluate_split} when it has succeeded"
            )
        if linked.promotion is not None:
            click.echo(f"run {linked.promotion.run_id} then gives it the alias, if it is better")
    if wish.follow:
        for each in (record, *linked.records):
            follow_run(each.run_id, volume, store, wish.as_json)
    elif not wish.as_json:
        click.echo(f"  tandem runs watch {record.run_id}    follows it")


def _queue_sweep(sweep: str, jobs: "list[tuple[JobSpec, Scheduling]]", wish: Wish) -> None:
    from tandem.jobs.submit import submit_all

    volume, store, app = _connected()
    wish.links.check(jobs[0][0], volume)
    if not wish.as_json:
        # Said first: who interrupts this should know what to cancel.
        click.echo(f"{sweep}: {len(jobs)} runs on {jobs[0][0].dataset}")
    records = submit_all(jobs, volume, store, app)
    trained = zip((spec for spec, _ in jobs), records, strict=True)
    linked = submit_links(trained, wish.links, wish.scheduling, volume, store, app)
    if wish.as_json:
        then: dict[str, list[str]] = {}
        for each in linked:
            for name, run_id in each.document().items():
                then.setdefault(f"{name}s", []).append(run_id)
        print_json({"sweep": sweep, "run_ids": [record.run_id for record in records], **then})
    if wish.follow:
        follow_sweep(sweep, volume, store, wish.as_json)
    elif not wish.as_json:
        click.echo(f"  tandem runs list --sweep {sweep}    shows its table")
