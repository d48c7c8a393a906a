"""The way to the queue: the Celery settings that producer and worker share, each with its reason.

The message is only a wake-up, `tandem.run_job(run_id)`; the truth is the job record.
"""

from typing import Any

from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import OperationalError

from tandem.errors import BrokerUnavailable
from tandem.jobs.spec import JobSpec
from tandem.settings import QUEUES

RUN_JOB = "tandem.run_job"
_PRIORITIES = (0, 3, 6, 9)
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
    # A hard limit kills without a checkpoint.
    "task_time_limit": None,
    "task_serializer": "json",
    "accept_content": ["json"],
    # A mistyped queue must fail, not wait for ever.
    "task_create_missing_queues": False,
    # Each queue under its own key: with a shared one, a message would go to all three.
    "task_queues": tuple(Queue(name, Exchange(name), routing_key=name) for name in QUEUES),
    "task_default_queue": "default",
    "worker_hijack_root_logger": False,
    "worker_send_task_events": False,
}


def make_celery(redis_url: str) -> Celery:
    """Return a Celery application on the broker at `redis_url`; nothing connects yet."""
    app = Celery("tandem", broker=redis_url, set_as_current=False)
    app.conf.update(_SETTINGS)
    return app


def queue_for(spec: JobSpec) -> str:
    """Return the queue of a spec: that of its device, or the one that every worker takes from."""
    return {"auto": "default", "cpu": "cpu"}.get(spec.device, "gpu")


def priority_keys(queue: str) -> list[str]:
    """Return the Redis lists that hold a queue's messages; the first priority has the bare name."""
    return [queue, *(f"{queue}{_SEPARATOR}{priority}" for priority in _PRIORITIES[1:])]


def send_run(app: Celery, run_id: str, queue: str) -> None:
    """Put the wake-up for a run into its queue; raise BrokerUnavailable if that fails."""
    retry = {"max_retries": 2, "interval_start": 0.1, "interval_step": 0.3}
    try:
        app.send_task(RUN_JOB, args=[run_id], queue=queue, retry=True, retry_policy=retry)
    except (OperationalError, ConnectionError) as error:
        raise BrokerUnavailable(f"the broker did not take run {run_id}: {error}") from error
