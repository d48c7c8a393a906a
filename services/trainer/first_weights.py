"""The weights that a training run begins with: its own draw, a file's, or another model's."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from tandem.checkpoints.card import ClassifierCard
from tandem.checkpoints.foreign import read_weights
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.tensors import load_checkpoint
from tandem.data.manifest import ClassName
from tandem.errors import TrainingFailed
from tandem.jobs.spec import ClassifierJob
from tandem.models.classifiers import head_parameters
from tandem.models.weights import bare_state
from tandem.volume import Volume

log = logging.getLogger("tandem.run")

# torchvision's weights of the Inception family have heads that only training uses, and networks here are built without.
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def load_first_weights(
    network: nn.Module, spec: ClassifierJob, classes: Sequence[ClassName], image_size: int, volume: Volume, run_id: str
) -> None:
    """Load what `spec` asks for into `network`, its head excepted where that does not fit.

    The head of a file is kept if it has the same shape; that of a model if it has the same classes in the same order.
    Raises TrainingFailed, naming the first tensor that does not fit.
    """
    head = head_parameters(spec.arch, image_size)
    if spec.weights_file:
        tensors = read_weights(volume.run(run_id) / spec.weights_file)
        _load(network, tensors, head, f"{spec.arch} (stem {spec.stem})", Path(spec.weights_file).name)
    elif spec.weights_from:
        tensors = _weights_of_model(spec.weights_from, volume, head, classes)
        _load(network, tensors, head, f"{spec.arch} (stem {spec.stem})", spec.weights_from)


def _weights_of_model(
    reference: str, volume: Volume, head: Collection[str], classes: Sequence[ClassName]
) -> dict[str, Tensor]:
    located = Registry(volume).resolve(reference)
    checkpoint = load_checkpoint(located.checkpoint, located.digest)
    card, tensors = checkpoint.card, bare_state(checkpoint.network)
    if not isinstance(card, ClassifierCard):
        raise TrainingFailed(f"--weights: {located.label} is a language model")
    if [each.id for each in card.classes] != [each.id for each in classes]:
        return {name: tensor for name, tensor in tensors.items() if name not in head}
    return tensors


def _load(network: nn.Module, tensors: Mapping[str, Tensor], head: Collection[str], kind: str, source: str) -> None:
    own = network.state_dict()
    fits = {name for name in own if name in tensors and tensors[name].shape == own[name].shape}
    for name in own:
        # Counters of batches are missing in the oldest weights.
        if name not in fits and name not in head and not name.endswith("num_batches_tracked"):
            raise TrainingFailed(_misfit(name, own[name], tensors.get(name), kind, source))
    for name in tensors:
        if name not in own and not name.startswith(_AUXILIARY):
            raise TrainingFailed(f"--weights: {source} has a tensor {name!r} that {kind} has not: another --arch?")
    network.load_state_dict({name: tensors[name] for name in fits}, strict=False)
    new = sorted(name for name in head if name not in fits)
    log.info("began with the weights of %s; new: %s", source, ", ".join(new) or "nothing")


def _misfit(name: str, own: Tensor, given: Tensor | None, kind: str, source: str) -> str:
    if given is None:
        return f"--weights: {source} has no tensor {name!r}, which {kind} needs: another --arch?"
    shapes = f"{tuple(given.shape)}, in {kind} {tuple(own.shape)}"
    return f"--weights: {name} of {source} has the shape {shapes}: another --arch, --stem or --image-size?"
