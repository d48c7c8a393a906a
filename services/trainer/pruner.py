"""Removing what a run need not keep: after each save, and before one where the volume has too little room."""

import logging
from collections.abc import Iterable
from pathlib import Path

from tandem.checkpoints.best import best_checkpoint
from tandem.checkpoints.files import clear_leftovers, list_checkpoints, remove_checkpoints, step_of
from tandem.checkpoints.pins import locked_pins
from tandem.checkpoints.protection import Pins, pins_in_force
from tandem.checkpoints.retention import Keep, kept_steps
from tandem.checkpoints.room import bytes_on_disk, free_bytes, room_needed, too_little
from tandem.volume import Volume, volume_errors

log = logging.getLogger("tandem.run")


class Pruner:
    """Applies `keep` to the checkpoints of the run directory `run`; what is pinned stays.

    Checkpoints of the steps in `damaged` count for nothing: they make none go, and go themselves.
    """

    def __init__(self, run: Path, keep: Keep) -> None:
        self._run, self._keep = run, keep
        self.damaged: set[int] = set()
        self._told: set[Path] = set()

    def prune(self, step: int, steps_per_epoch: int) -> None:
        """Remove what is no longer kept now that the checkpoint of `step` is there."""
        with locked_pins(self._run):
            pins = self._pins()
            remove_checkpoints(self._expendable(pins, step, steps_per_epoch))
            for path in pins.stale:
                path.unlink(missing_ok=True)

    def make_room(self, num_bytes: int, step: int, steps_per_epoch: int) -> None:
        """See that a checkpoint of `num_bytes` at `step` fits, removing first what would be removed after it.

        The newest that is there stays in any case. Raises VolumeUnavailable, having removed no checkpoint, if even
        that would not be enough.
        """
        with volume_errors(self._run):
            clear_leftovers(self._run)
            if free_bytes(self._run) >= room_needed(num_bytes):
                return
            self.check_room(num_bytes, step, steps_per_epoch)
            with locked_pins(self._run):
                for checkpoint in self._expendable_before(step, steps_per_epoch):
                    if free_bytes(self._run) >= room_needed(num_bytes):
                        return
                    log.info("removed %s early: the volume is nearly full", checkpoint.name)
                    remove_checkpoints([checkpoint])

    def check_room(self, num_bytes: int, step: int, steps_per_epoch: int) -> None:
        """Raise VolumeUnavailable if a checkpoint of `num_bytes` at `step` would not fit, whatever may go for it."""
        with volume_errors(self._run):
            free = free_bytes(self._run)
            if free < room_needed(num_bytes):
                free += sum(bytes_on_disk(each) for each in self._expendable_before(step, steps_per_epoch))
            if free < room_needed(num_bytes):
                raise too_little(num_bytes, free, self._run, self._remedy())

    def _remedy(self) -> str:
        keeps_more = self._keep.last > 1 or self._keep.every
        return "make room, or keep fewer with --keep-last" if keeps_more else "make room"

    def _expendable_before(self, step: int, steps_per_epoch: int) -> list[Path]:
        """Return what would be removed after a save at `step`, oldest first, but for the last good one until then."""
        last_good = max(self._sound(step), default=None)
        return [
            checkpoint
            for checkpoint in self._expendable(self._pins(), step, steps_per_epoch)
            if step_of(checkpoint) != last_good
        ]

    def _expendable(self, pins: Pins, step: int, steps_per_epoch: int) -> list[Path]:
        if pins.unreadable:
            return []
        best = best_checkpoint(self._run)
        best_step = None if best is None else step_of(best)
        kept = kept_steps(self._sound(step) | {step}, self._keep, steps_per_epoch, best_step) | pins.steps
        return [each for each in list_checkpoints(self._run) if step_of(each) not in kept]

    def _sound(self, step: int) -> set[int]:
        # Steps beyond this one belong to an attempt whose later checkpoints were found damaged.
        there = {step_of(each) for each in list_checkpoints(self._run)}
        return {each for each in there - self.damaged if each <= step}

    def _pins(self) -> Pins:
        pins = pins_in_force(Volume(self._run.parent.parent), self._run.name)
        self._tell(
            pins.unreadable, "%s can't be read, so all checkpoints of this run are kept; remove it if none needs it"
        )
        self._tell(pins.unreadable_versions, "%s can't be read; what it refers to is kept by its pin alone")
        return pins

    def _tell(self, paths: Iterable[Path], message: str) -> None:
        for path in paths:
            if path not in self._told:
                log.warning(message, path)
                self._told.add(path)
