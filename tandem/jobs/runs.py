"""Runs as people see them: submit, list, find, cancel, resume.

The volume holds them all; Redis knows more while it is up.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.errors import BrokerUnavailable, InvalidJob, RunNotFound
from tandem.jobs import record as machine
from tandem.jobs.checks import check_job
from tandem.jobs.record import JobRecord
from tandem.jobs.spec import ClassifierJob, JobSpec
from tandem.volume import Volume, replace_file, replace_json, volume_errors

if TYPE_CHECKING:
    # Neither is imported to list runs.
    from collections.abc import Callable

    from celery import Celery

    from tandem.jobs.store import JobStore

RECORD_FILE = "record.json"
# What a run of each kind makes.
MODEL_KINDS = {"train_classifier": "classifier", "train_language_model": "language_model"}
SPEC_FILE = "job.json"


def submit(spec: JobSpec, volume: Volume, store: "JobStore", app: "Celery") -> JobRecord:
    """Write the run to the volume, its record to Redis, and wake a worker; return the record.

    Checked first, so that a refusal leaves nothing behind: the dataset fits the job, and the broker answers.
    """
    from tandem.jobs.queue import queue_for, send_run

    spec = check_job(spec, volume)
    store.ping()
    record = _new_record(spec, queue_for(spec))
    run = volume.run(record.run_id)
    try:
        with volume_errors(run):
            run.mkdir(parents=True)
            spec = _with_weights_file(spec, run)
            replace_file(run / SPEC_FILE, (spec.model_dump_json(indent=1) + "\n").encode())
            mirror(volume, record)
        store.create(record)
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        raise
    # From here on the run exists: where the message is lost, the reaper sends another.
    try:
        send_run(app, record.run_id, record.queue)
    except BrokerUnavailable as error:
        raise BrokerUnavailable(
            f"run {record.run_id} is queued, and begins when the broker answers again; don't submit it twice ({error})"
        ) from error
    return record


def _with_weights_file(spec: JobSpec, run: Path) -> JobSpec:
    """Copy the file that a classifier is to begin with into the run: the volume must be whole without it."""
    if not isinstance(spec, ClassifierJob) or spec.weights_file is None:
        return spec
    source = Path(spec.weights_file)
    copy = Path("weights") / source.name
    try:
        weights = source.read_bytes()
    except OSError as error:
        raise InvalidJob(f"--weights: {source} can't be read: {error.strerror}") from error
    (run / copy).parent.mkdir()
    replace_file(run / copy, weights)
    return spec.model_copy(update={"weights_file": str(copy)})


def _new_record(spec: JobSpec, queue: str) -> JobRecord:
    at = machine.now()
    return JobRecord(
        run_id=machine.new_run_id(),
        kind=spec.kind,
        dataset=spec.dataset,
        model_name=spec.model_name,
        queue=queue,
        submitted_at=at,
        updated_at=at,
    )


def mirror(volume: Volume, record: JobRecord, durable: bool = True) -> None:
    """Write the record to its run directory, so that the volume alone can tell it."""
    path = volume.run(record.run_id) / RECORD_FILE
    with volume_errors(path):
        replace_json(path, record.model_dump(mode="json"), durable)


def read_mirror(run: Path) -> JobRecord | None:
    """Return the record in a run directory, None where there is no readable one."""
    try:
        return JobRecord.model_validate_json((run / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def list_runs(volume: Volume, open_store: "Callable[[], JobStore | None]") -> list[JobRecord]:
    """Return all runs, newest first: from the volume, brought up to date from Redis where it answers.

    The store is opened only if a run is unfinished: importing redis takes half the time of `tandem runs list`.
    """
    run_ids = sorted((path.parent.name for path in volume.runs.glob(f"*/{RECORD_FILE}")), reverse=True)
    mirrors = {run_id: read_mirror(volume.run(run_id)) for run_id in run_ids}
    # A terminal state never changes, so only the others are asked for.
    open_ids = [run_id for run_id, record in mirrors.items() if record is None or not record.state.is_terminal]
    fresh = _from_broker(open_ids, open_store) if open_ids else {}
    records = (fresh.get(run_id) or mirrors[run_id] for run_id in run_ids)
    return [record for record in records if record is not None]


def _from_broker(run_ids: list[str], open_store: "Callable[[], JobStore | None]") -> dict[str, JobRecord]:
    store = open_store()
    try:
        return {} if store is None else store.get_many(run_ids)
    except BrokerUnavailable:
        return {}


def find_run(run_id: str, volume: Volume, store: "JobStore | None") -> JobRecord:
    """Return the newest record of a run; `latest` names the newest run. Raises RunNotFound."""
    if run_id == "latest":
        runs = list_runs(volume, lambda: store)
        if not runs:
            raise RunNotFound("there are no runs yet; 'tandem train' submits one")
        return runs[0]
    mirrored = read_mirror(volume.run(run_id))
    record = mirrored
    if store is not None and (mirrored is None or not mirrored.state.is_terminal):
        try:
            record = store.get(run_id) or mirrored
        except BrokerUnavailable:
            record = mirrored
    if record is None:
        raise RunNotFound(f"no run {run_id!r} on the volume; 'tandem runs list' shows them")
    return record


def cancel(run_id: str, volume: Volume, store: "JobStore") -> JobRecord:
    """Ask for the end of a run: a waiting one ends at once, a running one after saving a checkpoint."""
    found = find_run(run_id, volume, store)
    # A broker that has lost its data is given the record back first.
    store.create(found)
    record = store.update(found.run_id, machine.request_cancel)
    mirror(volume, record)
    return record


def resume(run_id: str, volume: Volume, store: "JobStore", app: "Celery") -> JobRecord:
    """Put a failed or canceled run back into its queue; it goes on from its newest checkpoint."""
    from tandem.jobs.queue import send_run

    record = find_run(run_id, volume, store)
    # A volume that can't be written is found before the state changes.
    mirror(volume, record)
    store.create(record)
    record = store.update(record.run_id, machine.resume)
    mirror(volume, record)
    send_run(app, record.run_id, record.queue)
    return record
