"""What a worker's parent does beside handing out runs: it says that it lives, finds lost runs, and calls webhooks."""

import logging
import os
import secrets
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any

from celery import Celery, bootsteps

from services.trainer.health import Heartbeat
from services.trainer.reaper import Reaper
from services.trainer.webhooks import Webhooks
from tandem.errors import TandemError
from tandem.jobs.broker import Broker
from tandem.jobs.queue import send_run
from tandem.jobs.store import JobStore, connect
from tandem.settings import Settings
from tandem.volume import Volume

log = logging.getLogger(__name__)

_BEAT_S = 2.0
# How often the reaper sweeps in the time of a lease.
_SWEEPS = 5


def caretaker(
    app: Celery, settings: Settings, broker: Broker, queues: Sequence[str], num_slots: int
) -> type[bootsteps.StartStopStep]:
    """Return a boot step that beats and sweeps on the worker's own timer."""
    store = JobStore(connect(broker), broker)
    volume = Volume(settings.home, settings.checkpoint_store)
    reaper = Reaper(store, volume, settings.lease_s, partial(send_run, app))
    webhooks = Webhooks(JobStore(connect(broker), broker), volume)
    # Containers may share a host name, and each have pid 1.
    host, pid = socket.gethostname(), os.getpid()
    name = f"{host}-{pid}-{secrets.token_hex(3)}"
    # Asked while the loop stands still, which may be because this broker hangs.
    heartbeat = Heartbeat(settings.heartbeat_file, JobStore(connect(broker, is_impatient=True), broker).ping)
    facts = {"worker": name, "host": host, "pid": pid, "queues": list(queues), "slots": num_slots}

    def beat() -> None:
        try:
            store.beat(name, 5 * _BEAT_S, facts)
            store.add_queues(queues)
        except TandemError as error:
            log.warning("no heartbeat: %s", error)
        heartbeat.loop_turned()

    class Caretaker(bootsteps.StartStopStep):
        requires = ("celery.worker.components:Timer",)

        def start(self, worker: Any) -> None:
            beat()
            heartbeat.start()
            reaper.sweep()
            worker.timer.call_repeatedly(_BEAT_S, beat)
            worker.timer.call_repeatedly(settings.lease_s / _SWEEPS, reaper.sweep)
            webhooks.start()

    return Caretaker
