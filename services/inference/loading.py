"""A checkpoint made ready to answer: verified, built, and put behind its runtime."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import nn

from services.inference.calibration import calibration_pixels
from services.inference.memory import Footprint, tensor_bytes
from services.inference.runtimes.interface import ClassifierRuntime, LanguageRuntime
from services.inference.runtimes.language import EagerLanguageModel
from services.inference.runtimes.selection import RuntimeSelector, Selected, shared_copy
from services.inference.runtimes.turns import Turns, at_once
from services.inference.texts import TextLoop
from tandem.checkpoints.card import ClassifierCard, LanguageModelCard
from tandem.checkpoints.files import WEIGHTS_FILE
from tandem.checkpoints.registry import Located
from tandem.checkpoints.tensors import Checkpoint, load_checkpoint
from tandem.comparison.results import ModelVersion
from tandem.data.vocabulary import Vocabulary
from tandem.errors import CheckpointCorrupt, InvalidRequest, OutOfMemory
from tandem.models.language_models import LanguageModel
from tandem.models.scoring import TextScorer
from tandem.volume import Volume
from tandem.wire.results import RuntimeDetails

# What loading needs at its worst, as multiples of the weights' file. A checkpoint is read, parsed and put into the
# network: three times its weights for a moment. A classifier then keeps itself and two compiled forms on a CPU, with
# the kernels of every size of batch (64 px, two threads: ResNet-18 247 MiB of 43, ResNet-50 502 of 91). DenseNet-121
# keeps ten times (279 of 28): its second version reserves what its first one took.
_CLASSIFIER, _LANGUAGE_MODEL = 5, 3
_KERNELS = 64 * 2**20
# A word of a vocabulary: the string, its place in a list and in a dictionary.
_WORD = 150

log = logging.getLogger("tandem.inference.loading")


@dataclass(frozen=True)
class ServedClassifier:
    """A classifier that answers; `selected` says why by this runtime."""

    located: Located
    card: ClassifierCard
    runtime: ClassifierRuntime
    # Its images may share batches with those of other calls; see `independence`.
    joins: bool = False
    selected: Selected | None = None
    footprint: Footprint = field(default_factory=Footprint)
    # The same on the other devices, in their order.
    elsewhere: tuple["ServedClassifier", ...] = ()

    @property
    def everywhere(self) -> tuple["ServedClassifier", ...]:
        """It on each device."""
        return (self, *self.elsewhere)

    def on(self, number: int) -> "ServedClassifier":
        """Return it as it is on a device."""
        return self.everywhere[number]

    @property
    def runtimes(self) -> tuple[ClassifierRuntime, ...]:
        """All that calls on its device may run it by."""
        return (self.runtime,) if self.selected is None else (self.runtime, self.selected.eager)

    def in_float32(self) -> "ServedClassifier":
        """Return it as Compare runs it: eager, in float32, whatever answers otherwise."""
        return self if self.selected is None else replace(self, runtime=self.selected.eager)


@dataclass(frozen=True)
class ServedLanguageModel:
    """A language model that answers."""

    located: Located
    card: LanguageModelCard
    runtime: LanguageRuntime
    vocabulary: Vocabulary
    scorer: TextScorer
    # Writes the texts of all callers; there once the model is on its device.
    texts: TextLoop | None = None
    footprint: Footprint = field(default_factory=Footprint)
    # The same on the other devices, in their order.
    elsewhere: tuple["ServedLanguageModel", ...] = ()

    @property
    def everywhere(self) -> tuple["ServedLanguageModel", ...]:
        """It on each device."""
        return (self, *self.elsewhere)

    def on(self, number: int) -> "ServedLanguageModel":
        """Return it as it is on a device."""
        return self.everywhere[number]

    @property
    def runtimes(self) -> tuple[LanguageRuntime, ...]:
        """All that calls on its device may run it by."""
        return (self.runtime,)


Served = ServedClassifier | ServedLanguageModel


def needed_bytes(located: Located, num_replicas: int = 1) -> int:
    """Return what loading `located` is expected to need at its worst, on a device with so many replicas of it.

    It is 0 if the checkpoint is not there, which loading finds out.
    """
    try:
        weights = (located.checkpoint / WEIGHTS_FILE).stat().st_size
    except OSError:
        return 0
    if located.version is not None and located.version.kind == "language_model":
        return _LANGUAGE_MODEL * weights
    return num_replicas * (_CLASSIFIER * weights + _KERNELS)


def load(
    located: Located,
    devices: Sequence[torch.device],
    selectors: Sequence[RuntimeSelector],
    turns: Sequence[Turns] | None = None,
    volume: Volume | None = None,
) -> Served:
    """Verify and load what `located` names, read once and put on each device with its selector, tried out in its turns.

    `volume` is where the data are that int8 is fitted to.

    Raises CheckpointCorrupt or TrainingFailed. A classifier's runtimes have run batches of every size; a language model
    is not yet warm.
    """
    try:
        checkpoint = load_checkpoint(located.checkpoint, located.digest)
        if isinstance(checkpoint.card, ClassifierCard):
            places = _Places(devices, selectors, turns or [at_once] * len(devices), volume)
            return _classifier(located, checkpoint.card, _copies(checkpoint.network, devices), places)
        return _language_model(located, checkpoint.card, checkpoint, devices)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(f"there is not enough memory on {' and '.join(map(str, devices))} for it") from error


@dataclass(frozen=True)
class _Places:
    """The devices, with what belongs to each."""

    devices: Sequence[torch.device]
    selectors: Sequence[RuntimeSelector]
    turns: Sequence[Turns]
    volume: Volume | None


def _classifier(
    located: Located, card: ClassifierCard, networks: Sequence[nn.Module], places: _Places
) -> ServedClassifier:
    calibration = None if places.volume is None else partial(calibration_pixels, places.volume, card)
    selected = [
        selector.select(network, card.preprocessing, turns, calibration)
        for network, selector, turns in zip(networks, places.selectors, places.turns, strict=True)
    ]
    log.info("%s in %s runs on %s", located.label, selected[0].runtime.dtype, selected[0].reason)
    footprint = Footprint(_most_on_one(places.devices, [each.num_bytes for each in selected]))
    first, *others = (
        ServedClassifier(located, card, each.runtime, selected=each, footprint=footprint) for each in selected
    )
    return replace(first, elsewhere=tuple(others))


def _language_model(
    located: Located, card: LanguageModelCard, checkpoint: Checkpoint, devices: Sequence[torch.device]
) -> ServedLanguageModel:
    vocabulary, own = checkpoint.vocabulary, tensor_bytes(checkpoint.network)
    if vocabulary is None:
        raise CheckpointCorrupt("a language model without a vocabulary")
    # On a CPU the replicas share their tensors.
    taken = own if devices[0].type == "cpu" else _most_on_one(devices, [own] * len(devices))
    footprint = Footprint(taken + _WORD * len(vocabulary))
    first, *others = (
        _on_device(located, card, vocabulary, cast(LanguageModel, network.to(device)), device, footprint)
        for network, device in zip(_copies(checkpoint.network, devices), devices, strict=True)
    )
    return replace(first, elsewhere=tuple(others))


def _on_device(
    located: Located,
    card: LanguageModelCard,
    vocabulary: Vocabulary,
    network: LanguageModel,
    device: torch.device,
    footprint: Footprint,
) -> ServedLanguageModel:
    runtime, scorer = EagerLanguageModel(network, device), TextScorer(network, device)
    return ServedLanguageModel(located, card, runtime, vocabulary, scorer, footprint=footprint)


def _copies(network: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
    """Return `network` for each device; on a CPU around the same tensors."""
    copied = shared_copy if devices[0].type == "cpu" else copy.deepcopy
    return [*(copied(network) for _ in devices[1:]), network]


def _most_on_one(devices: Sequence[torch.device], num_bytes: Sequence[int]) -> int:
    on_each: dict[torch.device, int] = {}
    for device, taken in zip(devices, num_bytes, strict=True):
        on_each[device] = on_each.get(device, 0) + taken
    return max(on_each.values())


def version_of(served: Served) -> ModelVersion:
    """Say who answers."""
    version, card = served.located.version, served.card
    return ModelVersion(
        name=version.name if version else "",
        version=version.version if version else 0,
        run_id=served.located.run_id,
        step=card.step,
        architecture=card.architecture,
        dtype=served.runtime.dtype,
    )


def runtime_of(served: Served) -> RuntimeDetails | None:
    """Say how a classifier is run, and why; None for a language model."""
    if not isinstance(served, ServedClassifier) or served.selected is None:
        return None
    runtime, drift = served.runtime, served.selected.drift
    return RuntimeDetails(runtime.name, runtime.dtype, served.selected.reason, drift.largest, drift.mean)


def as_classifier(served: Served, field: str = "model") -> ServedClassifier:
    """Return `served` if it is a classifier; raise InvalidRequest about `field` otherwise."""
    if isinstance(served, ServedClassifier):
        return served
    raise InvalidRequest(
        f"{served.located.label} is a language model ({served.card.architecture}); this call needs a classifier",
        field=field,
    )


def as_language_model(served: Served, field: str = "model") -> ServedLanguageModel:
    """Return `served` if it is a language model; raise InvalidRequest about `field` otherwise."""
    if isinstance(served, ServedLanguageModel):
        return served
    raise InvalidRequest(
        f"{served.located.label} is a classifier ({served.card.architecture}); this call needs a language model",
        field=field,
    )
