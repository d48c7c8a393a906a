"""What a call's context says of its caller's wishes: until when, and how urgent."""

import time
from collections.abc import Iterable

from services.inference.context import Context
from services.inference.lanes import Priority
from tandem.errors import InvalidRequest
from tandem.wire.limits import PRIORITY_KEY


def priority_of(context: Context) -> Priority:
    """Return what the metadata says; raise InvalidRequest if it is no priority."""
    return priority_in(context.invocation_metadata() or ())


def priority_in(metadata: Iterable[tuple[str, str | bytes]]) -> Priority:
    """Return the priority that the metadata of a call says; raise InvalidRequest if it is none."""
    said = next((value for key, value in metadata if key == PRIORITY_KEY), "normal")
    try:
        return Priority[str(said).upper()]
    except KeyError:
        raise InvalidRequest(f"{PRIORITY_KEY} is {said!r}; it is low, normal or high", field=PRIORITY_KEY) from None


def deadline_of(context: Context) -> float | None:
    """Return when the caller stops waiting, as a time.monotonic() value."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s
