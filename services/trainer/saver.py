"""Saving and finding the checkpoints of one run."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from services.trainer.engine.reports import Training
from tandem.checkpoints.card import Card, parse_card
from tandem.checkpoints.files import (
    MODEL_FILE,
    WEIGHTS_FILE,
    list_checkpoints,
    read_pointer,
    read_verified,
    remove_checkpoints,
    step_directory,
    write_checkpoint,
    write_pointer,
)
from tandem.checkpoints.tensors import from_bytes, to_bytes
from tandem.errors import CheckpointCorrupt, NonFiniteLoss, TrainingFailed
from tandem.models.weights import bare_state, load_weights
from tandem.volume import to_json

TRAINER_STATE_FILE = "trainer_state.safetensors"
_KEEP_NEWEST = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of the run directory `run`, with `files` in each.

    `fence` raises when another attempt has begun. Of several processes only the `is_writer` writes; the others take
    part, since a snapshot may need them all.
    """

    run: Path
    make_card: Callable[[int, int, dict[str, float]], Card]
    files: Mapping[str, bytes]
    fence: Callable[[], None]
    is_writer: bool = True

    def save(self, training: Training, metrics: Mapping[str, float], is_best: bool = False) -> Path:
        """Save weights and trainer state, move `latest` (and `best`), and remove what no pointer needs.

        Raises NonFiniteLoss for weights that are no numbers: the checkpoint before them is the last good one.
        """
        state = training.snapshot()
        checkpoint = step_directory(self.run, training.step)
        if not self.is_writer:
            return checkpoint
        weights = bare_state(training.served_network)
        _check_weights(weights, training.step)
        card = self.make_card(training.finished_epochs, training.step, dict(metrics))
        files = {
            **self.files,
            WEIGHTS_FILE: to_bytes(weights),
            MODEL_FILE: to_json(card.model_dump(mode="json")),
            TRAINER_STATE_FILE: to_bytes(state),
        }
        self.fence()
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

    def resume(self, training: Training, other: Path | None = None) -> Card | None:
        """Load the newest checkpoint that verifies into `training`; return its card, None where there is none.

        Without one of the run's own, `other` is continued, a checkpoint of another run; the best epoch is then sought
        anew, since the other's is not this run's to publish. Raises TrainingFailed if the dataset has been replaced
        since, and CheckpointCorrupt if `other` can't be loaded.
        """
        for checkpoint in reversed(list_checkpoints(self.run)):
            try:
                return self._load(training, checkpoint)
            except CheckpointCorrupt as error:
                log.warning("skipped a damaged checkpoint: %s", error)
        if other is None:
            return None
        card = self._load(training, other)
        training.forget_best()
        return card

    def _load(self, training: Training, checkpoint: Path) -> Card:
        files = read_verified(checkpoint, (WEIGHTS_FILE, TRAINER_STATE_FILE, MODEL_FILE))
        card = parse_card(files[MODEL_FILE])
        self._check_dataset(card)
        load_weights(training.served_network, from_bytes(files[WEIGHTS_FILE]))
        training.restore(from_bytes(files[TRAINER_STATE_FILE]))
        return card

    def _check_dataset(self, card: Card) -> None:
        if card.dataset_fingerprint != self.make_card(0, 0, {}).dataset_fingerprint:
            raise TrainingFailed(
                f"dataset {card.dataset!r} has been replaced since this run began; submit a new run, or put it back"
            )


def _check_weights(weights: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteLoss(f"{name} holds numbers that are not finite by step {step}; lower --learning-rate")


def load_best(run: Path, network: nn.Module) -> Path:
    """Load the weights that `best` points at into `network`; return their checkpoint."""
    checkpoint = read_pointer(run, "best")
    if checkpoint is None:
        raise CheckpointCorrupt(f"run {run.name} has no best checkpoint")
    load_weights(network, from_bytes(read_verified(checkpoint, (WEIGHTS_FILE,))[WEIGHTS_FILE]))
    return checkpoint
