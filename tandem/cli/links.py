"""What follows a training: an evaluation of its best checkpoint, and the promotion of what it has published."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tandem.checkpoints.promotion import opponent
from tandem.errors import InvalidJob
from tandem.jobs.scheduling import Scheduling
from tandem.jobs.spec import PromotionJob, make_spec

if TYPE_CHECKING:
    from celery import Celery

    from tandem.jobs.record import JobRecord
    from tandem.jobs.spec import JobSpec
    from tandem.jobs.store import JobStore
    from tandem.volume import Volume

Command = TypeVar("Command", bound=Callable[..., Any])

# Options that say how a promotion is decided, with the fields that they give.
_GATE = {"better_than": "against", "min_gain": "min_gain", "alpha": "alpha"}

_OPTIONS = (
    click.option("--evaluate", "evaluate_split", metavar="SPLIT", help="Then evaluate the best checkpoint on it."),
    click.option(
        "--promote",
        "promote_alias",
        metavar="ALIAS",
        help="Then give the new version this alias, if it is better than what has it.",
    ),
    click.option("--if-better-than", "better_than", metavar="REF", help="What --promote is to beat instead."),
    click.option("--min-gain", type=float, help="Of --promote: the least gain, a share.  [default: 0]"),
    click.option("--alpha", type=float, help="Of --promote: the level of the paired test.  [default: 0.05]"),
)


def link_options(command: Command) -> Command:
    """Add the options; `take_links` takes their values from the command's."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Links:
    """What is to follow a training; `promotion` has the fields of the job, None where there is none."""

    evaluate_split: str | None = None
    promotion: dict[str, Any] | None = None

    def evaluation(self, spec: "JobSpec", run_id: str) -> "JobSpec | None":
        """Return the evaluation of what the run `run_id` of `spec` makes."""
        if self.evaluate_split is None:
            return None
        values = {"model": f"run:{run_id}", "split": self.evaluate_split, **_basis(spec)}
        return make_spec({"kind": spec.kind.replace("train_", "evaluate_"), **values})

    def promoting(self, spec: "JobSpec", run_id: str) -> "PromotionJob | None":
        """Return the promotion of what the run `run_id` of `spec` publishes, on the split of the evaluation."""
        if self.promotion is None:
            return None
        split = {"split": self.evaluate_split} if self.evaluate_split else {}
        values = {"model": f"run:{run_id}", **split, **_basis(spec), **self.promotion}
        values["against"] = opponent(spec.model_name, values["alias"], values.get("against"))
        job = make_spec({"kind": spec.kind.replace("train_", "promote_"), **values})
        assert isinstance(job, PromotionJob)
        return job

    def check(self, spec: "JobSpec", volume: "Volume") -> None:
        """Raise what the links would be refused with, before anything is submitted."""
        from tandem.jobs.checks import check_job

        for job in (self.evaluation(spec, "awaited"), self.promoting(spec, "awaited")):
            if job is not None:
                check_job(job, volume, awaited=("awaited",))


@dataclass(frozen=True)
class Linked:
    """The runs that follow a training."""

    evaluation: "JobRecord | None" = None
    promotion: "JobRecord | None" = None

    @property
    def records(self) -> "list[JobRecord]":
        """In their order."""
        return [each for each in (self.evaluation, self.promotion) if each is not None]

    def document(self) -> dict[str, str]:
        """Return what --json says of them."""
        named = {"evaluation_run_id": self.evaluation, "promotion_run_id": self.promotion}
        return {name: each.run_id for name, each in named.items() if each is not None}


def take_links(values: dict[str, Any]) -> Links:
    """Take the options' values out of `values`; raise UsageError for one that makes no sense alone."""
    split, alias = values.pop("evaluate_split", None), values.pop("promote_alias", None)
    gate = {field: values.pop(option) for option, field in _GATE.items() if values.get(option) is not None}
    if alias is None and gate:
        raise click.UsageError("--if-better-than, --min-gain and --alpha are of --promote")
    links = Links(split, None if alias is None else {"alias": alias, **gate})
    try:
        # Whatever is wrong with a value is said before anything is read.
        if links.promotion is not None:
            make_spec({"kind": "promote_classifier", "model": "run:awaited", "dataset": "any", **links.promotion})
    except InvalidJob as error:
        raise click.UsageError(str(error)) from None
    return links


def submit_links(
    trained: "Iterable[tuple[JobSpec, JobRecord]]",
    links: Links,
    scheduling: Scheduling,
    volume: "Volume",
    store: "JobStore",
    app: "Celery",
) -> list[Linked]:
    """Submit what follows each of the runs; return it in their order."""
    trained = list(trained)
    found = [Linked() for _ in trained]
    if links.evaluate_split is not None:
        jobs = [
            (links.evaluation(spec, record.run_id), _after(scheduling, f"evaluate/{links.evaluate_split}", record))
            for spec, record in trained
        ]
        found = [Linked(record) for record in _submit(jobs, volume, store, app)]
    if links.promotion is not None:
        jobs = [
            (
                links.promoting(spec, record.run_id),
                _after(scheduling, f"promote/{links.promotion['alias']}", record, *linked.records),
            )
            for (spec, record), linked in zip(trained, found, strict=True)
        ]
        promotions = _submit(jobs, volume, store, app)
        found = [replace(linked, promotion=each) for linked, each in zip(found, promotions, strict=True)]
    return found


def _submit(
    jobs: "list[tuple[Any, Scheduling]]", volume: "Volume", store: "JobStore", app: "Celery"
) -> "list[JobRecord]":
    from tandem.jobs.submit import submit_all

    return submit_all(jobs, volume, store, app)


def _after(scheduling: Scheduling, what: str, *before: "JobRecord") -> Scheduling:
    return Scheduling.model_validate(
        {
            "priority": scheduling.priority,
            "gpu": scheduling.gpu,
            "after": tuple(each.run_id for each in before),
            "key": f"{scheduling.key}/{what}" if scheduling.key else None,
        }
    )


def _basis(spec: "JobSpec") -> dict[str, Any]:
    return {"dataset": spec.dataset, "device": spec.device, "num_threads": spec.num_threads}
