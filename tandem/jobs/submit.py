"""Submitting runs: checked, written to the volume, recorded in Redis, and a worker woken."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.checkpoints.store.inputs import share_inputs
from tandem.checkpoints.store.objects import ObjectStore
from tandem.errors import BrokerUnavailable, Conflict, InvalidJob
from tandem.jobs import record as machine
from tandem.jobs.chains import release_ready
from tandem.jobs.checks import check_job
from tandem.jobs.queue import check_queue, queue_for, send_run
from tandem.jobs.record import JobRecord, State
from tandem.jobs.references import pin_references
from tandem.jobs.runs import RECORD_FILE, SPEC_FILE, cancel, find_run
from tandem.jobs.scheduling import Scheduling
from tandem.jobs.spec import ClassifierJob, JobSpec, parse_spec
from tandem.volume import Volume, replace_file, sync_together, to_json, volume_errors

if TYPE_CHECKING:
    from celery import Celery

    from tandem.jobs.store import JobStore


PLAIN = Scheduling()
_WRITERS = 16


def submit(
    spec: JobSpec, volume: Volume, store: "JobStore", app: "Celery", scheduling: Scheduling = PLAIN
) -> JobRecord:
    """Write the run to the volume, its record to Redis, and wake a worker; return the record.

    Checked first, so that a refusal leaves nothing behind: the dataset fits the job, and the broker answers. With a
    key that was used before, the run of then is returned; Conflict if it was for another job.
    """
    return submit_all([(spec, scheduling)], volume, store, app)[0]


def submit_all(
    jobs: Sequence[tuple[JobSpec, Scheduling]], volume: Volume, store: "JobStore", app: "Celery"
) -> list[JobRecord]:
    """Submit several runs, none if one of them is refused; return their records in the same order."""
    checked = [(check_job(spec, volume, scheduling.after), scheduling) for spec, scheduling in jobs]
    store.ping()
    queues = [queue_for(spec, scheduling.gpu) for spec, scheduling in checked]
    for queue in set(queues):
        check_queue(queue, store)
    # In the order of the jobs, for ids sort by second and then by chance.
    run_ids = sorted(machine.new_run_id() for _ in checked)
    records = [
        new_record(spec, queue, scheduling).model_copy(update={"run_id": run_id})
        for (spec, scheduling), queue, run_id in zip(checked, queues, run_ids, strict=True)
    ]
    submitted = {record.run_id for record in records}
    records = _create_all([spec for spec, _ in checked], records, volume, store)
    # From here on the runs exist: where a message is lost, the reaper sends another. Those of a key used before do too.
    _wake([record for record in records if record.run_id in submitted], volume, store, app)
    return [find_run(record.run_id, volume, store) if record.state is State.WAITING else record for record in records]


def _wake(records: list[JobRecord], volume: Volume, store: "JobStore", app: "Celery") -> None:
    if not records:
        return
    try:
        for record in records:
            if record.state is State.QUEUED:
                send_run(app, record)
        if any(record.state is State.WAITING for record in records):
            release_ready(volume, store, lambda ready: send_run(app, ready))
    except BrokerUnavailable as error:
        raise BrokerUnavailable(
            f"run {records[0].run_id} is queued, and begins when the broker answers again; don't submit it twice "
            f"({error})"
        ) from error


def _create_all(
    specs: Sequence[JobSpec], records: Sequence[JobRecord], volume: Volume, store: "JobStore"
) -> list[JobRecord]:
    """Write and record the runs; where one of several fails, cancel those that are there."""
    if len(records) == 1:
        return [_create(specs[0], records[0], volume, store)]
    # Nearly all of the time goes into fsync, of which a file system does many at once as fast as one.
    pool = ThreadPoolExecutor(_WRITERS)
    done = [pool.submit(_create, spec, record, volume, store) for spec, record in zip(specs, records, strict=True)]
    try:
        return [each.result() for each in done]
    except BaseException:
        pool.shutdown(cancel_futures=True)
        for each in done:
            if not each.cancelled() and each.exception() is None:
                cancel(each.result().run_id, volume, store)
        raise
    finally:
        pool.shutdown()


def _create(spec: JobSpec, record: JobRecord, volume: Volume, store: "JobStore") -> JobRecord:
    if record.key and (owner := store.run_of_key(record.key)):
        return _same_run(owner, spec, record.key, volume, store)
    # Not 'latest', which will be another run soon.
    after = tuple(find_run(before, volume, store).run_id for before in record.after)
    record = record.model_copy(update={"after": after})
    run = volume.run(record.run_id)
    try:
        with volume_errors(run):
            _write_run(run, spec, record)
        if volume.store is not None:
            # A worker may be on a host that does not see this volume.
            share_inputs(ObjectStore(volume.store), run)
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        raise
    try:
        owner = store.create(record)
    except BrokerUnavailable as error:
        # It may have been done, and only the answer lost: without its files the run would be a ghost.
        raise BrokerUnavailable(
            f"run {record.run_id} may be queued or not ('tandem runs show {record.run_id}' tells): {error}"
        ) from error
    if owner is not None:
        # Somebody else has used the key this very moment.
        shutil.rmtree(run, ignore_errors=True)
        return _same_run(owner, spec, str(record.key), volume, store)
    return record


def _write_run(run: Path, spec: JobSpec, record: JobRecord) -> None:
    run.parent.mkdir(parents=True, exist_ok=True)
    run.mkdir()
    spec = _with_weights_file(spec, run)
    (run / SPEC_FILE).write_bytes((spec.model_dump_json(indent=1) + "\n").encode())
    pin_references(spec, run.name, Volume(run.parent.parent))
    # The record comes last: a directory without one is no run.
    (run / RECORD_FILE).write_bytes(to_json(record.model_dump(mode="json")))
    # Whoever submits is told only after this.
    sync_together((run / SPEC_FILE, run / RECORD_FILE, run, run.parent))


def _same_run(run_id: str, spec: JobSpec, key: str, volume: Volume, store: "JobStore") -> JobRecord:
    try:
        first = parse_spec((volume.run(run_id) / SPEC_FILE).read_bytes())
    except FileNotFoundError:
        raise Conflict(f"--key: {key!r} was used for run {run_id}, which is gone; take another key") from None
    if first != spec and _without_files(first) != _without_files(spec):
        raise Conflict(f"--key: {key!r} was used for run {run_id}, which is another job; take another key")
    return find_run(run_id, volume, store)


def _without_files(spec: JobSpec) -> JobSpec:
    """Return a spec without the path of its weights, which lie in the run once it is submitted."""
    return spec.model_copy(update={"weights_file": None}) if isinstance(spec, ClassifierJob) else spec


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


def new_record(spec: JobSpec, queue: str, scheduling: Scheduling) -> JobRecord:
    """Return the first record of a run, with an id of its own."""
    at = machine.now()
    waits = bool(scheduling.after or scheduling.sweep)
    return JobRecord(
        run_id=machine.new_run_id(),
        kind=spec.kind,
        dataset=spec.dataset,
        model_name=spec.model_name,
        queue=queue,
        state=State.WAITING if waits else State.QUEUED,
        submitted_at=at,
        updated_at=at,
        **scheduling.model_dump(exclude={"gpu"}),
    )
