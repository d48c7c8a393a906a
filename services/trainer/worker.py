"""The Celery worker: the one place where the trainer is wired. `python -m services.trainer.worker`.

The parent imports neither torch nor grpc, so its children may be forked. Each child carries one run at a time.
"""

import atexit
import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from celery import Celery, bootsteps, signals
from celery.exceptions import Reject

from services.trainer.reaper import Reaper
from services.trainer.supervisor import Outcome, Supervisor
from tandem.errors import TandemError
from tandem.jobs.queue import RUN_JOB, make_celery, send_run
from tandem.jobs.store import JobStore, connect
from tandem.local.state import require_redis_url
from tandem.processes import end_with_parent
from tandem.settings import Settings
from tandem.volume import Volume, volume_errors

log = logging.getLogger(__name__)

_BEAT_S = 2.0
# Longer than the supervisor's own patience, so that what is being saved is saved.
_DRAIN_PATIENCE_S = 10.0


def build_worker(settings: Settings, redis_url: str) -> Celery:
    """Return the application with its task, its reaper and its drain, ready for `worker_main`."""
    app = make_celery(redis_url)
    volume = Volume(settings.home)
    # A file, since the children are processes of their own: it exists once the worker has been told to stop.
    folder = Path(tempfile.mkdtemp(prefix="tandem-drain-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    drain = folder / "drain"
    supervisor = Supervisor(
        JobStore(connect(redis_url), redis_url), volume, settings.lease_s, settings.stop_grace_s, drain.exists
    )

    @app.task(name=RUN_JOB, bind=True)
    def run_job(self: Any, run_id: str) -> None:  # noqa: ARG001
        if drain.exists() or supervisor.carry(run_id) is Outcome.DRAINED:
            raise Reject(requeue=True)

    def begin_drain(**_: Any) -> None:
        drain.touch()
        # Celery waits for its broker for ever, also to acknowledge; a worker told to stop must end without one.
        threading.Thread(target=_end_without_broker, args=(redis_url,), daemon=True).start()

    signals.worker_shutting_down.connect(begin_drain, weak=False)
    signals.worker_process_init.connect(_die_with_parent, weak=False)
    app.steps["worker"].add(_caretaker(app, settings, volume, redis_url))
    return app


def _end_without_broker(redis_url: str) -> None:
    """End this process, and with it its children, once the broker has been away for a while."""
    store = JobStore(connect(redis_url), redis_url)
    answered = time.monotonic()
    while time.monotonic() - answered < _DRAIN_PATIENCE_S:
        time.sleep(0.5)
        with contextlib.suppress(TandemError):
            store.ping()
            answered = time.monotonic()
    log.warning("the broker is gone; runs in progress go on from their checkpoints when another worker finds them")
    os._exit(1)


def _die_with_parent(**_: Any) -> None:
    """In a child: be killed with the parent, and with us our training process, so that none computes on unseen."""
    end_with_parent()


def _caretaker(app: Celery, settings: Settings, volume: Volume, redis_url: str) -> type[bootsteps.StartStopStep]:
    """Return a boot step that beats and sweeps on the worker's own timer."""
    store = JobStore(connect(redis_url), redis_url)
    reaper = Reaper(store, volume, settings.lease_s, lambda record: send_run(app, record.run_id, record.queue))
    host = f"{socket.gethostname()}-{os.getpid()}"

    def beat() -> None:
        try:
            store.beat(host, 5 * _BEAT_S, {"worker": host, "pid": os.getpid(), "queues": settings.queues})
        except TandemError as error:
            log.warning("no heartbeat: %s", error)

    class Caretaker(bootsteps.StartStopStep):
        requires = ("celery.worker.components:Timer",)

        def start(self, worker: Any) -> None:
            beat()
            reaper.sweep()
            worker.timer.call_repeatedly(_BEAT_S, beat)
            worker.timer.call_repeatedly(max(settings.lease_s / 3, 1.0), reaper.sweep)

    return Caretaker


def main() -> None:
    """Start the worker; one line and exit 1 where broker or volume are not there."""
    try:
        settings = Settings.from_environment()
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        redis_url = require_redis_url(settings)
        with volume_errors(settings.home):
            for directory in ("datasets", "runs", "models"):
                (settings.home / directory).mkdir(parents=True, exist_ok=True)
        JobStore(connect(redis_url), redis_url).ping()
    except TandemError as error:
        sys.exit(f"tandem trainer: {error}")
    app = build_worker(settings, redis_url)
    options = ["--concurrency=1", "--pool=prefork", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["worker", f"--queues={settings.queues}", "--loglevel", settings.log_level, *options])


if __name__ == "__main__":
    main()
