"""How commands reach the broker."""

from typing import TYPE_CHECKING

from tandem.local.state import find_system, require_broker
from tandem.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

    from tandem.jobs.store import JobStore


def job_store(settings: Settings) -> "JobStore":
    """Return the store of the broker in use; raise BrokerUnavailable where none is known."""
    from tandem.jobs.store import JobStore, connect

    broker = require_broker(settings)
    return JobStore(connect(broker), broker)


def optional_job_store(settings: Settings) -> "JobStore | None":
    """Return the store, or None where no broker is known: the volume tells what it can."""
    broker = find_system(settings).broker
    if broker is None:
        return None
    from tandem.jobs.store import JobStore, connect

    return JobStore(connect(broker), broker)


def celery_app(settings: Settings) -> "Celery":
    """Return the application that sends runs to the workers."""
    from tandem.jobs.queue import make_celery

    return make_celery(require_broker(settings))
