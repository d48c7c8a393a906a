"""Out of memory: what it looks like, and how large a batch would have fitted."""

from collections.abc import Callable

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory ran out, on a GPU or (as a plain RuntimeError) on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def largest_that_fits(attempt: Callable[[int], None], too_large: int) -> int:
    """Return about the largest batch below `too_large` for which `attempt` has the memory, to 1 part in 16; 0 for none.

    Other errors of `attempt` are raised.
    """
    fits, fails = 0, too_large
    while fails - fits > max(fits // 16, 1):
        middle = (fits + fails) // 2
        if _has_memory(attempt, middle):
            fits = middle
        else:
            fails = middle
    return fits


def _has_memory(attempt: Callable[[int], None], count: int) -> bool:
    try:
        attempt(count)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True
