"""Waiting for what will come: as long as it takes on a busy machine, since only what never comes is a fault."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.inference.scheduler import DeviceScheduler

# Minutes: where tests run beside others on few cores, a process took 40 s to import torch.
PATIENCE_S = 240.0


def wait_for(condition: Callable[[], object], what: str = "") -> None:
    """Wait until `condition` holds; fail the test after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what or condition} did not happen in {PATIENCE_S:.0f} s"
        time.sleep(0.05)


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Do the same on an event loop."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what or condition} did not happen in {PATIENCE_S:.0f} s"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def held(scheduler: "DeviceScheduler") -> AsyncIterator[None]:
    """Hold a device within the context."""
    opened, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        opened.wait(PATIENCE_S)

    holding = asyncio.create_task(scheduler.run(hold))
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    try:
        yield
    finally:
        opened.set()
        await holding
