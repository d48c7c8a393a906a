"""From the options of `tandem train` to runs: one, a sweep of them, and what follows them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.output import print_json
from tandem.cli.scheduling import take_scheduling
from tandem.cli.sweep import follow_sweep, parse_sweeps, sweep_jobs
from tandem.errors import InvalidJob
from tandem.jobs.scheduling import Scheduling
from tandem.jobs.spec import make_spec

if TYPE_CHECKING:
    from celery import Celery

    from tandem.jobs.record import JobRecord
    from tandem.jobs.spec import JobSpec
    from tandem.jobs.store import JobStore
    from tandem.volume import Volume


@dataclass(frozen=True)
class Wish:
    """What is to be done with the spec, beside training."""

    scheduling: Scheduling
    evaluate_split: str | None
    follow: bool
    as_json: bool


def submit_training(kind: str, network: str, *, show_spec: bool = False, **values: Any) -> None:
    """Submit a run of `kind` with the options' values, or a sweep; `network` is the field that names it in words."""
    given = {name: value for name, value in values.items() if value is not None}
    swept = parse_sweeps(given.pop("sweeps", ()), click.get_current_context().command)
    max_parallel = given.pop("max_parallel", None)
    if max_parallel and not swept:
        raise click.UsageError("--max-parallel is of a --sweep")
    evaluate_split = given.pop("evaluate_split", None)
    follow, as_json = given.pop("follow", False), given.pop("as_json", False)
    wish = Wish(take_scheduling(given), evaluate_split, follow, as_json)

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
    return Volume(settings.home), job_store(settings), celery_app(settings)


def _queue(spec: "JobSpec", network: str, wish: Wish) -> None:
    from tandem.cli.follow import follow_run
    from tandem.jobs.submit import submit

    volume, store, app = _connected()
    _check_evaluation(spec, wish, volume)
    record = submit(spec, volume, store, app, wish.scheduling)
    evaluations = _evaluate_after([(spec, record)], wish, volume, store, app)
    if wish.as_json:
        then = {"evaluation_run_id": evaluations[0].run_id} if evaluations else {}
        print_json({"run_id": record.run_id, **then})
    else:
        click.echo(
            f"run {record.run_id} is {record.state.lower()}: {network} on {spec.dataset}, to become model "
            f"{spec.model_name!r}"
        )
        for evaluation in evaluations:
            click.echo(f"run {evaluation.run_id} evaluates it on {wish.evaluate_split} when it has succeeded")
    if wish.follow:
        for each in (record, *evaluations):
            follow_run(each.run_id, volume, store, wish.as_json)
    elif not wish.as_json:
        click.echo(f"  tandem runs watch {record.run_id}    follows it")


def _queue_sweep(sweep: str, jobs: "list[tuple[JobSpec, Scheduling]]", wish: Wish) -> None:
    from tandem.jobs.submit import submit_all

    volume, store, app = _connected()
    _check_evaluation(jobs[0][0], wish, volume)
    if not wish.as_json:
        # Said first: who interrupts this should know what to cancel.
        click.echo(f"{sweep}: {len(jobs)} runs on {jobs[0][0].dataset}")
    records = submit_all(jobs, volume, store, app)
    evaluations = _evaluate_after(zip((spec for spec, _ in jobs), records, strict=True), wish, volume, store, app)
    if wish.as_json:
        then = {"evaluation_run_ids": [each.run_id for each in evaluations]} if evaluations else {}
        print_json({"sweep": sweep, "run_ids": [record.run_id for record in records], **then})
    if wish.follow:
        follow_sweep(sweep, volume, store, wish.as_json)
    elif not wish.as_json:
        click.echo(f"  tandem runs list --sweep {sweep}    shows its table")


def _evaluate_after(
    trained: "Iterable[tuple[JobSpec, JobRecord]]", wish: Wish, volume: "Volume", store: "JobStore", app: "Celery"
) -> "list[JobRecord]":
    """Submit an evaluation after each of the runs, if one is wished for."""
    from tandem.jobs.submit import submit_all

    if wish.evaluate_split is None:
        return []
    jobs = []
    for spec, record in trained:
        key = f"{wish.scheduling.key}/evaluate/{wish.evaluate_split}" if wish.scheduling.key else None
        links = {
            "priority": wish.scheduling.priority,
            "gpu": wish.scheduling.gpu,
            "after": (record.run_id,),
            "key": key,
        }
        jobs.append((_evaluation(spec, record.run_id, wish.evaluate_split), Scheduling.model_validate(links)))
    return submit_all(jobs, volume, store, app)


def _evaluation(spec: "JobSpec", run_id: str, split: str) -> "JobSpec":
    basis = {"dataset": spec.dataset, "device": spec.device, "num_threads": spec.num_threads}
    return make_spec(
        {"kind": spec.kind.replace("train_", "evaluate_"), "model": f"run:{run_id}", "split": split, **basis}
    )


def _check_evaluation(spec: "JobSpec", wish: Wish, volume: "Volume") -> None:
    """Raise what the evaluation to follow would be refused with, before anything is submitted."""
    from tandem.jobs.checks import check_job

    if wish.evaluate_split is not None:
        check_job(_evaluation(spec, "awaited", wish.evaluate_split), volume, awaited=("awaited",))
