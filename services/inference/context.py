"""What all that handles calls speaks of."""

from collections.abc import Callable
from typing import Any

import grpc

from tandem.wire.status import WireStatus

Context = grpc.aio.ServicerContext[Any, Any]
# The boundary's: the status of an error in a method (/package.Service/Method), None for one that is none.
StatusOf = Callable[[str, BaseException], WireStatus | None]

# Packages whose calls are ours to count, to bound and to explain; health and reflection are not.
OUR_PACKAGES = ("tandem.", "inference.")


def is_ours(method: str) -> bool:
    """Return whether `method`, package.Service/Method, with or without its first slash, is of our own services."""
    return method.removeprefix("/").startswith(OUR_PACKAGES)
