"""`tandem up` in the foreground: start the stack, watch it, stop it on SIGINT, SIGTERM or SIGHUP."""

import signal
import time
from collections.abc import Callable

from tandem.local.stack import Ports, Stack
from tandem.settings import Settings

_WATCH_S = 0.5


class _StopRequested(BaseException):
    """Raised by the signal handlers, at whatever point the work is."""


def run_stack(
    settings: Settings,
    ports: Ports,
    with_tensorboard: bool,
    say: Callable[[str], None],
    ready: Callable[[Stack], None],
) -> None:
    """Run the system until a signal comes; `ready` is called once when everything answers."""

    def stop(*_: object) -> None:
        raise _StopRequested

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with Stack(settings, ports, with_tensorboard, say) as stack:
            ready(stack)
            while True:
                time.sleep(_WATCH_S)
                stack.restart_dead()
    except _StopRequested:
        say("stopped")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
