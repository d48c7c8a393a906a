"""How the server stops: callers are sent elsewhere, served for a while, waited for, and the rest is given up."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from services.inference.health import HealthBoard
from services.inference.observation import Observer
from tandem.access import is_loopback

# Load balancers and Kubernetes need some seconds until they send nothing more; on loopback there are none.
DELAY_S = 5.0
# For calls that were given up to end, before gRPC cuts them off.
_MARGIN_S = 2.0

log = logging.getLogger("tandem.inference")


@dataclass(frozen=True)
class Patience:
    """For how many seconds the server goes on when it is not ready any more, and how many calls under way get then."""

    delay_s: float
    grace_s: float


def patience(host: str, delay_s: float | None, grace_s: float) -> Patience:
    """Return the patience of a server on `host`; without `delay_s` what fits there."""
    if delay_s is None:
        delay_s = 0.0 if is_loopback(host) else DELAY_S
    return Patience(delay_s, grace_s)


async def drain(
    server: grpc.aio.Server,
    health: HealthBoard,
    observer: Observer,
    patience: Patience,
    end_watches: Callable[[], None] = lambda: None,
) -> None:
    """Stop `server`: no call that it takes fails, unless it takes longer than the grace; those end UNAVAILABLE.

    `end_watches` ends those that have no end of their own.
    """
    await health.stopping()
    if patience.delay_s:
        log.info("stopping: not ready any more, and serving on for %g s", patience.delay_s)
        await asyncio.sleep(patience.delay_s)
    log.info("stopping: no new calls; those under way have %g s", patience.grace_s)
    end_watches()
    stopping = asyncio.ensure_future(server.stop(patience.grace_s + _MARGIN_S))
    try:
        # For calls alone: who watches the health would do so for ever.
        await asyncio.wait_for(observer.idle(), patience.grace_s)
        # A call that gRPC had taken and not yet begun may begin now; it has the rest of the time.
        observer.end_others()
        await asyncio.wait_for(asyncio.shield(stopping), patience.grace_s)
    except TimeoutError:
        log.warning("calls given up after %g s: %d", patience.grace_s, observer.num_active)
    observer.end_all()
    await stopping
