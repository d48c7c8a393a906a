"""What Python's garbage collector goes through in a server: what was made since its start, not what it imported."""

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

log = logging.getLogger("tandem.inference")


def freeze_imports(later: Sequence[str] = ()) -> None:
    """Keep all objects that there are now out of every later collection, after importing the modules `later`.

    To be called once, before the first model is loaded: what is in circles and frozen stays in memory for ever. torch,
    SciPy and OpenVINO leave 0.3 million objects, which a full collection goes through with the interpreter's lock held.
    """
    began = time.perf_counter()
    for name in later:
        # Whoever needs it says that it is missing or broken.
        with suppress(Exception):
            import_module(name)
    gc.collect()
    gc.freeze()
    log.debug("%d objects are collected no more, in %.1f s", gc.get_freeze_count(), time.perf_counter() - began)
