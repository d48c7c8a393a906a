"""Which checkpoints of a run are kept: a pure rule."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """What a run keeps besides its best: the newest `last` (1 or more), and one at the end of each `every`-th epoch."""

    last: int = 2
    every: int | None = None


def kept_steps(
    steps: Collection[int], keep: Keep, steps_per_epoch: int, best: int | None = None, pinned: Collection[int] = ()
) -> set[int]:
    """Return those of `steps` that are kept: newest, best, pinned, and those that end each `keep.every`-th epoch.

    What is not kept now is not kept later either, if `best` and `pinned` stay: to remove at each save leaves the same
    as to remove once.
    """
    newest = sorted(steps)[-keep.last :]
    wanted = {*newest, *pinned, *([] if best is None else [best])}
    return {step for step in steps if step in wanted or _ends_each(step, keep.every, steps_per_epoch)}


def _ends_each(step: int, every: int | None, steps_per_epoch: int) -> bool:
    return every is not None and step > 0 and step % (every * steps_per_epoch) == 0
