"""`local/system.json`: what `tandem up` started, so that every other command finds it."""

import os
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from tandem.errors import BrokerUnavailable, ServerUnavailable
from tandem.jobs.broker import Broker
from tandem.settings import Settings
from tandem.volume import Volume

STATE_FILE = "system.json"


class Service(BaseModel):
    """A started process; `address` is a URL or host:port, `log` a path."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pid: int
    start_time: int
    address: str = ""
    log: str = ""


class SystemState(BaseModel):
    """The manager (the `tandem up` process) and its services by name: broker, trainer, inference, tensorboard."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    manager: Service
    services: dict[str, Service] = {}


def process_start_time(pid: int) -> int | None:
    """Return the start time of process `pid` in clock ticks since boot, None where there is no such process.

    With the pid it names one process for good: the kernel reuses pids.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def own_service() -> Service:
    """Return this process as a Service."""
    pid = os.getpid()
    return Service(pid=pid, start_time=process_start_time(pid) or 0)


def is_alive(service: Service) -> bool:
    """True while that very process runs."""
    return process_start_time(service.pid) == service.start_time


@dataclass(frozen=True)
class Found:
    """Where the parts are, from the environment first and from `tandem up` second; None where unknown."""

    broker: Broker | None
    inference_address: str | None


def read_state(volume: Volume) -> SystemState | None:
    """Return the state that a living `tandem up` wrote, None where none runs."""
    try:
        state = SystemState.model_validate_json((volume.local / STATE_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return state if is_alive(state.manager) else None


def find_system(settings: Settings) -> Found:
    """Say where broker and inference are."""
    state = read_state(Volume(settings.home, settings.checkpoint_store))
    services = state.services if state else {}
    broker, inference = services.get("broker"), services.get("inference")
    return Found(
        broker=settings.broker or (Broker.of(broker.address) if broker else None),
        inference_address=settings.inference_address or (inference.address if inference else None),
    )


def require_broker(settings: Settings) -> Broker:
    """Return the broker in use; raise BrokerUnavailable with the remedy where there is none."""
    broker = find_system(settings).broker
    if broker is None:
        raise BrokerUnavailable("no broker: start the system with 'tandem up --detach', or set TANDEM_REDIS_URL")
    return broker


def require_inference_address(settings: Settings) -> str:
    """Return the inference server's host:port; raise ServerUnavailable with the remedy where there is none."""
    address = find_system(settings).inference_address
    if address is None:
        raise ServerUnavailable(
            "no inference server: start the system with 'tandem up --detach', or set TANDEM_INFERENCE_ADDRESS"
        )
    return address
