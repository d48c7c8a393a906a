"""What a supervisor has of the object store: runs that other hosts began are brought here, what is saved goes there."""

import logging
from collections.abc import Callable
from pathlib import Path

from services.trainer.uploads import Uploads
from tandem.checkpoints.card import Card, parse_card, quality
from tandem.checkpoints.files import MODEL_FILE, list_checkpoints, step_of, verify
from tandem.checkpoints.references import ModelReference, parse_reference
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.store.inputs import bring_inputs
from tandem.checkpoints.store.objects import ObjectStore
from tandem.checkpoints.store.transfer import Stored, download_checkpoint, list_stored
from tandem.errors import CheckpointCorrupt, StoreUnavailable
from tandem.jobs.record import JobRecord
from tandem.jobs.references import named_models
from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import parse_spec
from tandem.volume import Volume

log = logging.getLogger(__name__)


class StoredRuns:
    """The runs of a volume that shares a store, or of one that shares none: then nothing is done."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._store = None if volume.store is None else ObjectStore(volume.store)

    def bring(self, record: JobRecord, goes_on: Callable[[], None]) -> None:
        """Have on the volume what the next attempt of a run needs: its spec, its newest checkpoint, what it refers to.

        `goes_on` is called between files. Where the store is away the attempt begins with what is here, unless the run
        has come further elsewhere: then StoreUnavailable is raised, since it would compute again what is saved.
        """
        if self._store is None:
            return
        run = self._volume.run(record.run_id)
        try:
            if not (run / SPEC_FILE).exists():
                bring_inputs(self._store, run)
            self._bring_newest(self._store, run, goes_on)
            self._bring_references(self._store, run, goes_on)
        except StoreUnavailable as error:
            if not (run / SPEC_FILE).exists() or max(_newest_whole(run), 0) < record.saved_step:
                raise
            log.warning("run %s begins with what is on this volume: %s", record.run_id, error)

    def uploads(self, run: Path, attempt: int) -> Uploads | None:
        """Return what uploads the checkpoints of an attempt, None without a store."""
        return None if self._store is None else Uploads(self._store, run, attempt)

    def _bring_newest(self, store: ObjectStore, run: Path, goes_on: Callable[[], None]) -> None:
        """Bring the newest whole checkpoint of a run, if it is newer than those here, and the best one."""
        there, newest_here = list_stored(store, run.name), _newest_whole(run)
        for stored in reversed(there):
            if stored.step <= newest_here or _bring(store, stored, self._volume, goes_on):
                break
        for stored, _ in _best_first(store, there):
            if stored.place(self._volume).is_dir() or _bring(store, stored, self._volume, goes_on):
                break

    def _bring_references(self, store: ObjectStore, run: Path, goes_on: Callable[[], None]) -> None:
        """Bring the checkpoints of runs that a run refers to; a version's is fetched by whoever loads it."""
        for name in named_models(parse_spec((run / SPEC_FILE).read_bytes())):
            reference = parse_reference(name)
            if isinstance(reference, ModelReference):
                Registry(self._volume).catch_up(reference.name)
            elif reference.step is not None:
                self._bring_step(store, reference.run_id, reference.step, goes_on)
            else:
                self._bring_published(store, reference.run_id)

    def _bring_step(self, store: ObjectStore, run_id: str, step: int, goes_on: Callable[[], None]) -> None:
        for stored in list_stored(store, run_id):
            is_here = stored.place(self._volume).is_dir()
            if stored.step == step and (is_here or _bring(store, stored, self._volume, goes_on)):
                return

    def _bring_published(self, store: ObjectStore, run_id: str) -> None:
        """Bring what a promotion asks of a run: its spec, which names its model, and the versions of that."""
        run = self._volume.run(run_id)
        if not (run / SPEC_FILE).exists():
            bring_inputs(store, run)
        Registry(self._volume).catch_up(parse_spec((run / SPEC_FILE).read_bytes()).model_name)


def _bring(store: ObjectStore, stored: Stored, volume: Volume, goes_on: Callable[[], None]) -> bool:
    """Download a checkpoint; False, with a line in the log, if it is damaged."""
    try:
        download_checkpoint(store, stored, stored.place(volume), goes_on=goes_on)
    except CheckpointCorrupt as error:
        log.warning("passed over a damaged checkpoint of the store: %s", error)
        return False
    log.info("run %s: %s came from %s", stored.run_id, stored.name, store.address)
    return True


def _newest_whole(run: Path) -> int:
    """Return the step of the newest checkpoint here that verifies, -1 where there is none."""
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            verify(checkpoint)
        except CheckpointCorrupt:
            continue
        return step_of(checkpoint)
    return -1


def _best_first(store: ObjectStore, there: list[Stored]) -> list[tuple[Stored, Card]]:
    """Return the evaluated checkpoints by their cards, best first; the bytes of a card are verified when it is used."""
    found = []
    for stored in there:
        try:
            card = parse_card(store.get(f"{stored.prefix}/{MODEL_FILE}") or b"")
        except CheckpointCorrupt:
            continue
        if quality(card.kind, card.metrics) > float("-inf"):
            found.append((stored, card))
    return sorted(found, key=lambda pair: -quality(pair[1].kind, pair[1].metrics))
