"""Which threads of the server go first where there are more of them than cores."""

import os
import sys
import threading
from contextlib import suppress

# A thread at 5 gets a third of what one at 0 gets of the core that they share.
NICENESS = 5


def give_way() -> None:
    """Let the event loop go before this thread, and before those that it starts, which are OpenVINO's.

    Calls wait for the loop, and batches wait for calls: with it behind the threads that compute, batches were smaller
    and single images came at 0.92 of the rate (32 in flight, 2 cores, n = 4 turns). What a load computes gives way
    too. Linux alone has a niceness for each thread.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
