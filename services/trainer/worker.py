"""The Celery worker: the one place where the trainer is wired. `python -m services.trainer.worker`.

The parent imports neither torch nor grpc, so its children may be forked. Each child carries one run at a time. With
`--one-run` the worker ends with its first run, for schedulers that give each run a machine of its own.
"""

import argparse
import atexit
import contextlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from billiard import current_process
from billiard.util import get_logger as get_pool_logger
from celery import Celery, signals
from celery.exceptions import Reject

from services.trainer.caretaker import caretaker
from services.trainer.metrics import NO_METER, Meter
from services.trainer.one_run import OneRun
from services.trainer.process import Spare
from services.trainer.slots import Slot, claim_slot, named_queues, plan_slots, queues_of
from services.trainer.supervisor import Outcome, Patience, Supervisor
from tandem.errors import TandemError
from tandem.gpus import list_gpus, read_gpus
from tandem.jobs.broker import Broker
from tandem.jobs.queue import RUN_JOB, make_celery, send_run
from tandem.jobs.store import JobStore, connect
from tandem.local.state import require_broker
from tandem.logs import configure_logging
from tandem.processes import end_with_parent
from tandem.settings import QUEUES, Settings
from tandem.volume import Volume, volume_errors

log = logging.getLogger(__name__)

# Longer than the supervisor's own patience with a broker that is away.
_DRAIN_PATIENCE_S = 10.0


def build_worker(
    settings: Settings,
    broker: Broker,
    slots: Sequence[Slot],
    queues: Sequence[str],
    meter: Meter = NO_METER,
    one_run: OneRun | None = None,
) -> Celery:
    """Return the application with its task, its reaper and its drain, ready for `worker_main`."""
    app = make_celery(broker, {*QUEUES, *queues})
    # For files that the children, which are processes of their own, share with their parent.
    folder = Path(tempfile.mkdtemp(prefix="tandem-worker-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    drain = folder / "drain"
    supervisor = _supervisor(settings, broker, app, drain.exists, meter)

    @app.task(name=RUN_JOB, bind=True)
    def run_job(self: Any, run_id: str) -> None:  # noqa: ARG001
        if drain.exists():
            raise Reject(requeue=True)
        busy = folder / f"busy-{os.getpid()}"
        busy.touch()
        try:
            outcome = supervisor.carry(run_id)
        finally:
            busy.unlink(missing_ok=True)
            if one_run is None and not drain.exists():
                supervisor.spare.ready()
        if outcome is Outcome.DRAINED:
            raise Reject(requeue=True)
        if one_run is not None and outcome is Outcome.DONE:
            # First, so that a message which comes before the signal is heard goes back.
            drain.touch()
            one_run.end(os.getppid())

    def begin_child(**_: Any) -> None:
        # Be killed with the parent, and with us our training process, so that none computes on unseen.
        end_with_parent()
        supervisor.spare.slot = claim_slot(folder, slots)
        supervisor.spare.ready()

    def begin_drain(**_: Any) -> None:
        drain.touch()
        # Celery waits for its broker for ever, also to acknowledge; a worker told to stop must end without one.
        patience_s = settings.stop_grace_s if any(folder.glob("busy-*")) else 0.0
        threading.Thread(target=_end_without_broker, args=(broker, folder, patience_s), daemon=True).start()

    if one_run is not None:
        one_run.watch(folder)
    signals.setup_logging.connect(_leave_logging, weak=False)
    signals.worker_shutting_down.connect(begin_drain, weak=False)
    signals.worker_process_init.connect(begin_child, weak=False)
    signals.worker_process_shutdown.connect(lambda **_: supervisor.spare.drop(), weak=False)
    app.steps["worker"].add(caretaker(app, settings, broker, queues, len(slots)))
    return app


def _supervisor(
    settings: Settings, broker: Broker, app: Celery, is_draining: Callable[[], bool], meter: Meter
) -> Supervisor:
    return Supervisor(
        JobStore(connect(broker), broker),
        Volume(settings.home, settings.checkpoint_store),
        Patience(settings.lease_s, settings.stop_grace_s),
        Spare(settings.preload),
        partial(send_run, app),
        is_draining,
        meter,
    )


def _leave_logging(**_: Any) -> None:
    """Being a receiver of setup_logging, keep Celery from handlers of its own: its tasks' log would look different."""
    pool = get_pool_logger()
    # The pool's own messages, that a child was killed, reach no other handler by themselves.
    pool.propagate = True
    pool.setLevel(logging.ERROR)


def start_metrics(listen: tuple[str, int], broker: Broker) -> Meter:
    """Answer scrapes at host and port from now on; return what the children are to count with."""
    from services.trainer.metrics import PrometheusMeter
    from services.trainer.queue_facts import StoredFacts
    from services.trainer.scrape import Present, make_registry
    from tandem.exposition import serve_metrics

    folder = Path(tempfile.mkdtemp(prefix="tandem-metrics-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # A child's number in the pool, which the one that replaces it has too.
    meter = PrometheusMeter(folder, place=lambda: getattr(current_process(), "index", "parent"))
    # Prometheus waits 10 s for a scrape.
    store = JobStore(connect(broker, is_impatient=True), broker)
    server = serve_metrics(listen, make_registry(folder, Present(store.ping, read_gpus, StoredFacts(store))))

    def begin(**_: Any) -> None:
        server.socket.close()
        meter.take_place()

    signals.worker_process_init.connect(begin, weak=False)
    return meter


def _end_without_broker(broker: Broker, folder: Path, grace_s: float) -> None:
    """End this process, and with it its children, once the broker has been away for a while.

    What is being saved is saved first: that may take `grace_s`.
    """
    deadline = time.monotonic() + grace_s
    while any(folder.glob("busy-*")) and time.monotonic() < deadline:
        time.sleep(0.5)
    store = JobStore(connect(broker), broker)
    answered = time.monotonic()
    while time.monotonic() - answered < _DRAIN_PATIENCE_S:
        time.sleep(0.5)
        with contextlib.suppress(TandemError):
            store.ping()
            answered = time.monotonic()
    log.warning("the broker is gone; runs in progress go on from their checkpoints when another worker finds them")
    os._exit(1)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m services.trainer.worker", description=__doc__)
    parser.add_argument("--queues", default="", help="take from exactly these, such as gpu-x8 (default: TANDEM_QUEUES)")
    parser.add_argument("--one-run", action="store_true", help="carry one run, then end")
    parser.add_argument(
        "--idle-exit-s", type=float, default=60.0, metavar="S", help="with --one-run: end where none comes in S seconds"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Start the worker; one line and exit 1 where broker or volume are not there."""
    arguments = parse_arguments()
    try:
        settings = Settings.from_environment()
        configure_logging(settings.log_level, settings.log_format)
        broker = require_broker(settings)
        gpus = list_gpus()
        num_slots = 1 if arguments.one_run else settings.num_slots
        slots = plan_slots(num_slots, gpus, sorted(os.sched_getaffinity(0)))
        queues = named_queues(arguments.queues) or queues_of(settings.queues, gpus, len(slots))
        with volume_errors(settings.home):
            for directory in ("datasets", "runs", "models"):
                (settings.home / directory).mkdir(parents=True, exist_ok=True)
        JobStore(connect(broker), broker).ping()
        meter = start_metrics(settings.metrics_listen, broker) if settings.metrics_listen else NO_METER
    except TandemError as error:
        sys.exit(f"tandem trainer: {error}")
    one_run = OneRun(arguments.idle_exit_s) if arguments.one_run else None
    app = build_worker(settings, broker, slots, queues, meter, one_run)
    # Celery too takes workers of one name for one.
    name = f"--hostname=trainer-{os.getpid()}-{secrets.token_hex(3)}@%h"
    options = ["--pool=prefork", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    slot_options = [f"--concurrency={len(slots)}", f"--queues={','.join(queues)}"]
    if settings.log_format == "json":
        # Where Celery writes its banner, and that it was told to stop, past all logging.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    app.worker_main(["worker", name, *slot_options, "--loglevel", settings.log_level, *options])


if __name__ == "__main__":
    main()
