"""Every TANDEM_* variable, read once into one frozen object.

| variable | meaning | default |
|---|---|---|
| TANDEM_HOME | the shared volume | ~/.tandem |
| TANDEM_REDIS_URL (or REDIS_URL) | broker and job records | the embedded broker of `tandem up` |
| TANDEM_INFERENCE_ADDRESS | host:port that clients call | the server of `tandem up` |
| TANDEM_LISTEN | host:port that the inference server listens on | 127.0.0.1:8500 |
| TANDEM_QUEUES | queues that a worker takes runs from | default,cpu,gpu |
| TANDEM_DEVICE | device of serving (a run names its own): auto, cpu, cuda, cuda:1 | auto |
| TANDEM_LEASE_S | seconds for which a worker holds a run without renewing | 15 |
| TANDEM_STOP_GRACE_S | seconds a training process gets to save before it is killed | 60 |
| TANDEM_LOG_LEVEL | DEBUG, INFO, WARNING, ERROR | INFO |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import InvalidRequest

# The queues there are: that of any worker, and those of its device.
QUEUES = ("default", "cpu", "gpu")
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class Settings:
    """What the environment says; see the module's table."""

    home: Path
    redis_url: str | None
    inference_address: str | None
    listen: str
    queues: str
    device: str
    lease_s: float
    stop_grace_s: float
    log_level: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the variables; raise InvalidRequest for a value that makes no sense."""
        get = environment.get
        return cls(
            home=Path(get("TANDEM_HOME") or "~/.tandem").expanduser().absolute(),
            redis_url=get("TANDEM_REDIS_URL") or get("REDIS_URL") or None,
            inference_address=get("TANDEM_INFERENCE_ADDRESS") or None,
            listen=get("TANDEM_LISTEN") or "127.0.0.1:8500",
            queues=_queues(get("TANDEM_QUEUES") or ",".join(QUEUES)),
            device=get("TANDEM_DEVICE") or "auto",
            lease_s=_seconds(environment, "TANDEM_LEASE_S", 15.0),
            stop_grace_s=_seconds(environment, "TANDEM_STOP_GRACE_S", 60.0),
            log_level=_log_level(get("TANDEM_LOG_LEVEL") or "INFO"),
        )


def _queues(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    if unknown := sorted(set(names) - set(QUEUES)):
        raise InvalidRequest(
            f"TANDEM_QUEUES={text!r}: no queue is called {unknown[0]!r}; there are {', '.join(QUEUES)}"
        )
    return ",".join(names)


def _log_level(text: str) -> str:
    if text.upper() not in _LOG_LEVELS:
        raise InvalidRequest(f"TANDEM_LOG_LEVEL={text!r} is none of {', '.join(_LOG_LEVELS)}")
    return text.upper()


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise InvalidRequest(f"{name}={text!r} is not a number of seconds above 0", field=name)
    return value
