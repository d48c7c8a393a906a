"""How Redis is reached: clients for each kind of address, and one line for each way it fails."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from tandem.jobs.broker import Broker
from tandem.jobs.broker_errors import broker_unavailable

# Seconds. A host that is cut off says nothing more: probes after 15 s of silence end a dead connection after 30, where
# the kernel by itself would take two hours.
KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
# A broker that was restarted leaves dead connections in the pool: the first command on one is tried again on a new one.
# Not after a timeout: the command has waited long enough, and every caller that must succeed tries again by itself.
_RETRY = Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=3, supported_errors=(RedisConnectionError,))


def connect(address: "Broker | str", is_impatient: bool = False) -> "redis.Redis":
    """Return a client of the broker at `address`; it connects when first used. Raises InvalidRequest for a bad URL.

    One that `is_impatient` gives up after 2 s and does not try again: for what must itself answer in time.
    """
    patience: dict[str, Any] = {"retry": _RETRY, "socket_timeout": 10}
    if is_impatient:
        patience = {"retry": Retry(NoBackoff(), 0), "socket_timeout": 2, "socket_connect_timeout": 2}
    return redis.Redis(**{**client_options(Broker.of(address)), **patience}, decode_responses=True)


def client_options(broker: Broker) -> dict[str, Any]:
    """Return what every redis-py client of ours takes, blocking or asyncio; `socket_timeout` is the caller's."""
    # Unix sockets can neither be slow to connect to, nor be dead without our being told.
    network = {"socket_connect_timeout": 3, "socket_keepalive": True, "socket_keepalive_options": KEEPALIVE}
    return {**broker.client_options(), **({} if broker.path else network)}


class RedisClient:
    """A client whose every method raises BrokerUnavailable where the broker does not answer."""

    def __init__(self, client: "redis.Redis", address: "Broker | str" = "") -> None:
        self._redis: Any = client
        self._address = str(Broker.of(address)) if address else ""

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise broker_unavailable(error, self._address) from error

    def ping(self) -> None:
        """Return if the broker answers."""
        with self._errors():
            self._redis.ping()

    def life(self) -> tuple[str, float]:
        """Return the id that the broker took when it started, and for how many seconds it has been up."""
        with self._errors():
            info = self._redis.info("server")
        return str(info["run_id"]), float(info["uptime_in_seconds"])

    def _time(self) -> float:
        seconds, microseconds = self._redis.time()
        return float(seconds) + float(microseconds) / 1e6
