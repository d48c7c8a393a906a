"""Saving and finding the checkpoints of one run."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from services.trainer.engine.optimizer_state import pending_bytes
from services.trainer.engine.reports import Training
from services.trainer.pruner import Pruner
from tandem.checkpoints.best import evaluated, mend_pointers, pointed_at
from tandem.checkpoints.card import Card, parse_card
from tandem.checkpoints.files import (
    MODEL_FILE,
    WEIGHTS_FILE,
    clear_leftovers,
    list_checkpoints,
    place_checkpoint,
    read_verified,
    staged_checkpoint,
    step_directory,
    step_of,
    write_pointer,
)
from tandem.checkpoints.retention import Keep
from tandem.checkpoints.tensors import from_bytes, to_bytes
from tandem.errors import CheckpointCorrupt, NonFiniteLoss, TrainingFailed
from tandem.models.weights import bare_state, load_weights
from tandem.volume import to_json

TRAINER_STATE_FILE = "trainer_state.safetensors"

log = logging.getLogger(__name__)


@dataclass
class Saver:
    """Writes the checkpoints of the run directory `run`, with `files` in each, and keeps what `keep` says of them.

    `fence()` keeps other attempts from beginning, and raises when one has. Of several processes only the `is_writer`
    writes; the others take part, since a snapshot may need them all.
    """

    run: Path
    make_card: Callable[[int, int, dict[str, float]], Card]
    files: Mapping[str, bytes]
    fence: Callable[[], AbstractContextManager[None]]
    is_writer: bool = True
    keep: Keep = field(default_factory=Keep)

    def __post_init__(self) -> None:
        self._pruner = Pruner(self.run, self.keep)

    def begin(self) -> None:
        """Clear away what a killed save has left; no process may look for a checkpoint before the writer has."""
        if self.is_writer:
            with self.fence():
                clear_leftovers(self.run)

    def save(self, training: Training, metrics: Mapping[str, float], is_best: bool = False) -> Path:
        """Save weights and trainer state, move `latest` (and `best`), and remove what need not be kept.

        Raises NonFiniteLoss for weights that are no numbers, and VolumeUnavailable where there is too little room: the
        checkpoint before them is the last good one, and stays.
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
        with self.fence():
            self._pruner.make_room(sum(map(len, files.values())), training.step, training.steps_per_epoch)
        with staged_checkpoint(checkpoint, files) as staged, self.fence():
            place_checkpoint(staged, checkpoint)
            self._pruner.damaged.discard(training.step)
            write_pointer(self.run, "latest", checkpoint, metrics)
            if is_best:
                write_pointer(self.run, "best", checkpoint, metrics)
            self._pruner.prune(training.step, training.steps_per_epoch)
        return checkpoint

    def check_room(self, training: Training) -> None:
        """Raise VolumeUnavailable if a checkpoint of `training` would not fit; each process must call this.

        Told before the first step rather than at the first save. The optimizer's state of later is counted; what a
        network carries from window to window, and an average that begins later, are not.
        """
        state = training.snapshot()
        if self.is_writer:
            tensors = [*bare_state(training.served_network).values(), *state.values()]
            num_bytes = sum(each.nbytes for each in tensors) + sum(map(len, self.files.values()))
            num_bytes += pending_bytes(training.optimizer)
            self._pruner.check_room(num_bytes, training.step + 1, training.steps_per_epoch)

    def resume(self, training: Training, other: Path | None = None) -> Card | None:
        """Load the newest checkpoint that verifies into `training`; return its card, None where there is none.

        Without one of the run's own, `other` is continued, a checkpoint of another run; the best epoch is then sought
        anew, since the other's is not this run's to publish. Raises TrainingFailed if the dataset has been replaced
        since, and CheckpointCorrupt if `other` can't be loaded.
        """
        found = self._resume_own(training)
        if self.is_writer:
            with self.fence():
                mend_pointers(self.run, found)
        if found is not None or other is None:
            return found and found[1]
        card = self._load(training, other)
        training.forget_best()
        return card

    def _resume_own(self, training: Training) -> tuple[Path, Card] | None:
        for checkpoint in reversed(list_checkpoints(self.run)):
            try:
                return checkpoint, self._load(training, checkpoint)
            except CheckpointCorrupt as error:
                log.warning("skipped a damaged checkpoint: %s", error)
                self._pruner.damaged.add(step_of(checkpoint))
        return None

    def _load(self, training: Training, checkpoint: Path) -> Card:
        # All of it: what is not needed to go on would be missing where the model is served.
        files = read_verified(checkpoint)
        for name in (MODEL_FILE, WEIGHTS_FILE, TRAINER_STATE_FILE):
            if name not in files:
                raise CheckpointCorrupt(f"the manifest of {checkpoint} lists no {name}")
        card = parse_card(files[MODEL_FILE])
        self._check_dataset(card)
        load_weights(training.served_network, from_bytes(files[WEIGHTS_FILE]))
        training.restore(from_bytes(files[TRAINER_STATE_FILE]))
        return card

    def load_best(self, network: nn.Module) -> tuple[Path, Card]:
        """Load the weights of the best checkpoint into `network`; return where it is, and its card.

        One that is damaged is passed over for the best of the others, and `best` then points there. Raises
        CheckpointCorrupt if no evaluated one is whole.
        """
        best = pointed_at(self.run, "best")
        for checkpoint in dict.fromkeys([*([best] if best else []), *(each for each, _ in evaluated(self.run))]):
            try:
                files = read_verified(checkpoint)
                card = parse_card(files[MODEL_FILE])
                load_weights(network, from_bytes(files[WEIGHTS_FILE]))
            except CheckpointCorrupt as error:
                log.warning("the best checkpoint is damaged, and the next best takes its place: %s", error)
                continue
            if self.is_writer and checkpoint != best:
                with self.fence():
                    write_pointer(self.run, "best", checkpoint, card.metrics)
            return checkpoint, card
        raise CheckpointCorrupt(
            f"run {self.run.name} has no best checkpoint that is whole; 'tandem runs resume' trains it anew"
        )

    def _check_dataset(self, card: Card) -> None:
        if card.dataset_fingerprint != self.make_card(0, 0, {}).dataset_fingerprint:
            raise TrainingFailed(
                f"dataset {card.dataset!r} has been replaced since this run began; submit a new run, or put it back"
            )


def _check_weights(weights: Mapping[str, Tensor], step: int) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteLoss(f"{name} holds numbers that are not finite by step {step}; lower --learning-rate")
