"""Which checkpoint of a run is the best, by the checkpoints themselves: a kill may come between them and a pointer."""

import logging
from pathlib import Path

from tandem.checkpoints.card import Card, parse_card, quality
from tandem.checkpoints.files import (
    MODEL_FILE,
    list_checkpoints,
    read_pointer,
    read_verified,
    step_of,
    verify,
    write_pointer,
)
from tandem.errors import CheckpointCorrupt
from tandem.volume import volume_errors

log = logging.getLogger(__name__)


def evaluated(run: Path) -> list[tuple[Path, Card]]:
    """Return the run's checkpoints of evaluated epochs with their cards, best first, the earlier of equals first.

    Of each only the card has been verified; those whose card is damaged are left out.
    """
    found = []
    for checkpoint in list_checkpoints(run):
        try:
            card = parse_card(read_verified(checkpoint, (MODEL_FILE,))[MODEL_FILE])
        except CheckpointCorrupt:
            continue
        if quality(card.kind, card.metrics) > float("-inf"):
            found.append((checkpoint, card))
    return sorted(found, key=lambda pair: -quality(pair[1].kind, pair[1].metrics))


def mend_pointers(run: Path, newest: tuple[Path, Card] | None) -> None:
    """Have `latest` and `best` say what is there up to `newest`, from which an attempt goes on; None: from nothing.

    A damaged checkpoint is no best: were it to stay that, the next best would be removed in time.
    """
    last_step = -1 if newest is None else step_of(newest[0])
    best = next((pair for pair in evaluated(run) if step_of(pair[0]) <= last_step and _is_whole(pair[0])), None)
    for name, wanted in (("latest", newest), ("best", best)):
        if wanted is None:
            with volume_errors(run):
                (run / f"{name}.json").unlink(missing_ok=True)
        elif pointed_at(run, name) != wanted[0]:
            write_pointer(run, name, wanted[0], wanted[1].metrics)


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CheckpointCorrupt as error:
        log.warning("a damaged checkpoint can't be the best of its run: %s", error)
        return False
    return True


def pointed_at(run: Path, name: str) -> Path | None:
    """Return what `read_pointer` does; None too where the pointer is damaged."""
    try:
        return read_pointer(run, name)
    except CheckpointCorrupt:
        return None


def best_checkpoint(run: Path) -> Path | None:
    """Return what `best` points at; where that is lost or leads nowhere, the best of the evaluated; None if none is."""
    pointed = pointed_at(run, "best")
    if pointed is not None and pointed.is_dir():
        return pointed
    return next((checkpoint for checkpoint, _ in evaluated(run)), None)
