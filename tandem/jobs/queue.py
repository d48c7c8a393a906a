"""The way to the queue: the Celery settings that producer and worker share, each with its reason.

The message is only a wake-up, `tandem.run_job(run_id)`; the truth is the job record.
"""

import base64
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from tandem.errors import InvalidJob
from tandem.jobs.broker import Broker
from tandem.jobs.broker_errors import broker_unavailable
from tandem.jobs.record import PRIORITIES, JobRecord
from tandem.jobs.spec import JobSpec
from tandem.jobs.store import KEEPALIVE
from tandem.settings import QUEUES

if TYPE_CHECKING:
    from tandem.jobs.store import JobStore

RUN_JOB = "tandem.run_job"
_PRIORITIES = tuple(PRIORITIES.values())
_SEPARATOR = ":"

# A week: Redis' default of an hour gives a running job to a second worker (celery #5935, #5306).
_VISIBILITY_TIMEOUT_S = 604_800

_TRANSPORT = {
    "visibility_timeout": _VISIBILITY_TIMEOUT_S,
    # Messages of a lost worker come back within 10 s; the default sweeps each 100 s (kombu #2558).
    "unacked_restore_interval": 10,
    "unacked_restore_throttle": 1,
    "sep": _SEPARATOR,
    "priority_steps": list(_PRIORITIES),
    "queue_order_strategy": "priority",
    # Without these a publish on a dead connection waits for ever.
    "socket_timeout": 30,
    "socket_connect_timeout": 3,
    "socket_keepalive": True,
    "socket_keepalive_options": KEEPALIVE,
    "health_check_interval": 25,
}

_SETTINGS: dict[str, Any] = {
    "broker_transport_options": _TRANSPORT,
    "visibility_timeout": _VISIBILITY_TIMEOUT_S,
    # The record says how a run ended; a second answer could only contradict it.
    "task_ignore_result": True,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    # A run holds the GPU for hours; a prefetched job would wait behind it.
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    # A drain stops runs by itself, with a checkpoint; soft shutdown would sleep its whole timeout (celery #9505).
    "worker_soft_shutdown_timeout": 0,
    # True loses running jobs in a 3 s outage of Redis.
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    # An answer such as READONLY or MISCONF would end the worker, and with it the run in progress.
    "broker_channel_error_retry": True,
    # A hard limit kills without a checkpoint.
    "task_time_limit": None,
    "task_serializer": "json",
    "accept_content": ["json"],
    # A mistyped queue must fail, not wait for ever.
    "task_create_missing_queues": False,
    "task_default_queue": "default",
    "worker_hijack_root_logger": False,
    "worker_send_task_events": False,
}


def make_celery(address: Broker | str, queues: Iterable[str] = QUEUES) -> Celery:
    """Return a Celery application on the broker at `address`, which may take from `queues`; nothing connects yet."""
    app = Celery("tandem", set_as_current=False)
    task_queues = tuple(_queue(name) for name in queues)
    app.conf.update(_SETTINGS, task_queues=task_queues, **Broker.of(address).celery_options())
    return app


def _queue(name: str) -> Queue:
    # Each under its own key: with a shared one, a message would go to all of them.
    return Queue(name, Exchange(name), routing_key=name)


def queue_for(spec: JobSpec, gpu: str | None = None) -> str:
    """Return the queue of a spec: by its device, the class of GPU it needs, and how many devices at once.

    `default` is that of any device; then `cpu`, `gpu`, `gpu-h200`; those of jobs on 4 devices end in `-x4`.
    """
    if gpu and spec.device == "cpu":
        raise InvalidJob("--gpu-class: the job's device is cpu; leave one of them away")
    device = {"auto": "default", "cpu": "cpu"}.get(spec.device, "gpu")
    num_devices = getattr(spec, "num_devices", 1)
    base = f"gpu-{gpu}" if gpu else device
    return base if num_devices == 1 or base == "cpu" else f"{base}-x{num_devices}"


def check_queue(queue: str, store: "JobStore") -> None:
    """Raise InvalidJob where no worker has ever taken from `queue`: a mistyped class would wait for ever.

    Before the first worker has come nothing is known but that classes of GPU need one.
    """
    known = store.served_queues()
    if queue not in known and (known or queue.startswith("gpu-")):
        there = ", ".join(known) or "none yet; start a worker"
        raise InvalidJob(f"no worker takes runs from the queue {queue!r} that this job needs (there are: {there})")


def priority_keys(queue: str) -> list[str]:
    """Return the Redis lists that hold a queue's messages; the first priority has the bare name."""
    return [queue, *(f"{queue}{_SEPARATOR}{priority}" for priority in _PRIORITIES[1:])]


def run_of_message(message: str) -> str | None:
    """Return the run that a message in a queue's list would wake, None where it is no such message."""
    try:
        body = json.loads(message)["body"]
        return str(json.loads(base64.b64decode(body))[0][0])
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def send_run(app: Celery, record: JobRecord) -> None:
    """Put the wake-up for a run into its queue; raise BrokerUnavailable if that fails."""
    retry = {"max_retries": 2, "interval_start": 0.1, "interval_step": 0.3}
    options: dict[str, Any] = {"queue": _queue(record.queue), "priority": PRIORITIES[record.priority]}
    try:
        app.send_task(RUN_JOB, args=[record.run_id], retry=True, retry_policy=retry, **options)
    except (OperationalError, ConnectionError) as error:
        raise broker_unavailable(error, str(Broker.of(app.conf.broker_url))) from error
