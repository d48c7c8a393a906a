"""What the server counts besides its models: calls by method and code, and loads."""

import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from services.inference.durations import Durations
from services.inference.observation import Observed

T = TypeVar("T")


@dataclass
class CallCounts:
    """Durations of ended calls by method and code; an Observer's listener."""

    durations: dict[tuple[str, str], Durations] = field(default_factory=dict)

    def __call__(self, call: Observed) -> None:
        """Count `call`."""
        # Methods are those that the server has: others never become an Observed that ends.
        self.durations.setdefault((call.method, call.code), Durations()).add(call.total_s)


@dataclass
class LoadCounts:
    """Loads of models, and how they ended."""

    seconds: Durations = field(default_factory=Durations)
    num_failures: int = 0

    async def count(self, load: Awaitable[T]) -> T:
        """Return what `load` does, and count it."""
        begun_at = time.monotonic()
        try:
            loaded = await load
        except Exception:
            self.num_failures += 1
            raise
        self.seconds.add(time.monotonic() - begun_at)
        return loaded
