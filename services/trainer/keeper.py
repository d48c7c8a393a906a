"""What a fleet of workers that come and go needs beside them: `python -m services.trainer.keeper --queues gpu,gpu-x8`.

A worker's parent finds lost runs, ends backoffs and calls webhooks (`caretaker`). Where workers exist only while there
is work, somebody has to do that in between: a run that waits for its next attempt has no message, so no worker would
ever be started for it. The keeper does it, takes no runs, and makes the queues known that workers would take from.
"""

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from functools import partial

from services.trainer.health import Heartbeat
from services.trainer.reaper import Reaper
from services.trainer.slots import named_queues
from services.trainer.webhooks import Webhooks
from tandem.errors import TandemError
from tandem.jobs.queue import make_celery, send_run
from tandem.jobs.store import JobStore, connect
from tandem.local.state import require_broker
from tandem.logs import configure_logging
from tandem.settings import QUEUES, Settings
from tandem.volume import Volume, volume_errors

log = logging.getLogger(__name__)

_SWEEPS = 5
_BEAT_S = 2.0


def keep(settings: Settings, queues: list[str], stop: threading.Event) -> None:
    """Sweep until `stop` is set; raise BrokerUnavailable where no broker answers at the start."""
    broker = require_broker(settings)
    store, volume = JobStore(connect(broker), broker), Volume(settings.home, settings.checkpoint_store)
    store.ping()
    app = make_celery(broker, {*QUEUES, *queues})
    reaper = Reaper(store, volume, settings.lease_s, partial(send_run, app))
    Webhooks(JobStore(connect(broker), broker), volume).start()
    heartbeat = Heartbeat(settings.heartbeat_file, JobStore(connect(broker, is_impatient=True), broker).ping)
    heartbeat.start()
    name = f"keeper-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    log.info("keeps %s; workers may come and go for %s", settings.home, ", ".join(queues))
    while not stop.is_set():
        _say_that_we_live(store, name, queues)
        reaper.sweep()
        heartbeat.loop_turned()
        stop.wait(min(settings.lease_s / _SWEEPS, _BEAT_S))


def _say_that_we_live(store: JobStore, name: str, queues: list[str]) -> None:
    facts = {"worker": name, "host": socket.gethostname(), "pid": os.getpid(), "queues": [], "slots": 0}
    try:
        store.beat(name, 5 * _BEAT_S, facts)
        # Again and again: a broker that has lost its data would refuse what is submitted.
        store.add_queues(queues)
    except TandemError as error:
        log.warning("no heartbeat: %s", error)


def _metrics(settings: Settings) -> None:
    from services.trainer.worker import start_metrics

    if settings.metrics_listen is not None:
        start_metrics(settings.metrics_listen, require_broker(settings))


def main() -> None:
    """Keep until SIGTERM or SIGINT; one line and exit 1 where broker or volume are not there."""
    parser = argparse.ArgumentParser("python -m services.trainer.keeper", description=__doc__)
    parser.add_argument("--queues", required=True, help="what workers take from when they are started: default,gpu-x8")
    arguments, stop = parser.parse_args(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = Settings.from_environment()
        configure_logging(settings.log_level, settings.log_format)
        with volume_errors(settings.home):
            for directory in ("datasets", "runs", "models"):
                (settings.home / directory).mkdir(parents=True, exist_ok=True)
        _metrics(settings)
        keep(settings, named_queues(arguments.queues), stop)
    except TandemError as error:
        sys.exit(f"tandem keeper: {error}")


if __name__ == "__main__":
    main()
