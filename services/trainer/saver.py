"""Saving and finding the checkpoints of one run."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from services.trainer.engine.reports import Training
from tandem.checkpoints.card import Card, parse_card
from tandem.checkpoints.files import (
    MODEL_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    list_checkpoints,
    read_pointer,
    read_verified,
    remove_checkpoints,
    step_directory,
    write_checkpoint,
    write_pointer,
)
from tandem.checkpoints.tensors import bare_state, from_bytes, load_weights, to_bytes
from tandem.errors import CheckpointCorrupt, TrainingFailed
from tandem.volume import to_json

TRAINER_STATE_FILE = "trainer_state.safetensors"
_KEEP_NEWEST = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of the run directory `run`; `fence` raises when another attempt has begun."""

    run: Path
    make_card: Callable[[int, int, dict[str, float]], Card]
    vocabulary: bytes | None
    fence: Callable[[], None]

    def save(self, training: Training, metrics: Mapping[str, float], is_best: bool = False) -> Path:
        """Save weights and trainer state, move `latest` (and `best`), and remove what no pointer needs."""
        card = self.make_card(training.finished_epochs, training.step, dict(metrics))
        files = {
            WEIGHTS_FILE: to_bytes(bare_state(training.network)),
            MODEL_FILE: to_json(card.model_dump(mode="json")),
            TRAINER_STATE_FILE: to_bytes(training.snapshot()),
        }
        if self.vocabulary is not None:
            files[VOCABULARY_FILE] = self.vocabulary
        self.fence()
        checkpoint = step_directory(self.run, training.step)
        write_checkpoint(checkpoint, files)
        write_pointer(self.run, "latest", checkpoint, metrics)
        if is_best:
            write_pointer(self.run, "best", checkpoint, metrics)
        self._prune(checkpoint)
        return checkpoint

    def _prune(self, checkpoint: Path) -> None:
        # Steps beyond this one belong to an attempt whose later checkpoints were found damaged.
        newest = [each for each in list_checkpoints(self.run) if each.name <= checkpoint.name][-_KEEP_NEWEST:]
        best = read_pointer(self.run, "best")
        remove_checkpoints(self.run, [*newest, *([best] if best else [])])

    def resume(self, training: Training) -> bool:
        """Load the newest checkpoint that verifies into `training`; False where there is none to go on from.

        Raises TrainingFailed if the dataset has been replaced since.
        """
        for checkpoint in reversed(list_checkpoints(self.run)):
            try:
                files = read_verified(checkpoint, (WEIGHTS_FILE, TRAINER_STATE_FILE, MODEL_FILE))
                self._check_dataset(parse_card(files[MODEL_FILE]))
                load_weights(training.network, from_bytes(files[WEIGHTS_FILE]))
            except CheckpointCorrupt as error:
                log.warning("skipped a damaged checkpoint: %s", error)
                continue
            training.restore(from_bytes(files[TRAINER_STATE_FILE]))
            return True
        return False

    def _check_dataset(self, card: Card) -> None:
        if card.dataset_fingerprint != self.make_card(0, 0, {}).dataset_fingerprint:
            raise TrainingFailed(
                f"dataset {card.dataset!r} has been replaced since this run began; submit a new run, or put it back"
            )


def load_best(run: Path, network: nn.Module) -> Path:
    """Load the weights that `best` points at into `network`; return their checkpoint."""
    checkpoint = read_pointer(run, "best")
    if checkpoint is None:
        raise CheckpointCorrupt(f"run {run.name} has no best checkpoint")
    load_weights(network, from_bytes(read_verified(checkpoint, (WEIGHTS_FILE,))[WEIGHTS_FILE]))
    return checkpoint
