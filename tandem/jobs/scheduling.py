"""How a run is to be carried out: what does not shape its result, and so stands beside the spec."""

import string
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tandem.errors import InvalidJob
from tandem.jobs.record import Priority
from tandem.names import check_name

_KEY_CHARACTERS = frozenset(string.ascii_letters + string.digits + "._:/-")


def _checked_webhook(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("give an address that begins with http:// or https://")
    # Raises ValueError for what is no port.
    if parts.port == 0 or any(not sign.isprintable() or sign.isspace() for sign in url):
        raise ValueError("there is a blank, a control character or no port in it")
    return url


def _checked_key(key: str) -> str:
    if not set(key) <= _KEY_CHARACTERS:
        raise ValueError("letters, digits and ._:/- only")
    return key


class Scheduling(BaseModel):
    """Place in the queue, limits, and links to other runs.

    - `key`: a second submission with the same key and the same job returns the first run.
    - `time_limit_s`: seconds of computing, after which the run saves and ends.
    - `gpu`: the class of GPU it needs (`h200`), as the workers name theirs.
    - `after`: runs that must have SUCCEEDED first.
    - `webhook`: the address that the record is posted to when the run has ended.
    - `max_failures`: failures in a row, without a new checkpoint in between, after which the run is FAILED.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    priority: Priority = "normal"
    key: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_checked_key)] | None = None
    time_limit_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    gpu: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=60)] | None = None
    after: tuple[str, ...] = ()
    webhook: Annotated[str, Field(max_length=2000), AfterValidator(_checked_webhook)] | None = None
    max_failures: int = Field(5, ge=1, le=1000)
    sweep: str | None = None
    max_parallel: int | None = Field(None, ge=1)
    varied: dict[str, Any] = Field(default_factory=dict)


# Where the command line's option has another name than the field.
_OPTIONS = {"time_limit_s": "--time-limit", "gpu": "--gpu-class"}


def make_scheduling(values: dict[str, Any]) -> Scheduling:
    """Validate `values`; raise InvalidJob that names the first wrong option."""
    try:
        made = Scheduling.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        option = _OPTIONS.get(field, f"--{field.replace('_', '-')}")
        reason = first["msg"].removeprefix("Value error, ")
        raise InvalidJob(f"{option}: {reason} (got {first['input']!r})", field=field) from None
    for run_id in made.after:
        check_name(run_id, "run")
    return made
