"""A checkpoint made ready to answer: verified, built, and put behind its runtime."""

from dataclasses import dataclass
from typing import cast

import torch

from services.inference.runtimes.eager import EagerClassifier, EagerLanguageModel
from services.inference.runtimes.interface import ClassifierRuntime, LanguageRuntime
from tandem.checkpoints.card import ClassifierCard, LanguageModelCard
from tandem.checkpoints.registry import Located
from tandem.checkpoints.tensors import load_checkpoint
from tandem.comparison.results import ModelVersion
from tandem.data.vocabulary import Vocabulary
from tandem.errors import CheckpointCorrupt, InvalidRequest
from tandem.models.language_models import LanguageModel


@dataclass(frozen=True)
class ServedClassifier:
    """A classifier that answers."""

    located: Located
    card: ClassifierCard
    runtime: ClassifierRuntime


@dataclass(frozen=True)
class ServedLanguageModel:
    """A language model that answers."""

    located: Located
    card: LanguageModelCard
    runtime: LanguageRuntime
    vocabulary: Vocabulary


Served = ServedClassifier | ServedLanguageModel


def load(located: Located, device: torch.device) -> Served:
    """Verify and load what `located` names; raise CheckpointCorrupt or TrainingFailed. Not yet warm."""
    checkpoint = load_checkpoint(located.checkpoint, located.digest)
    card = checkpoint.card
    if isinstance(card, ClassifierCard):
        return ServedClassifier(located, card, EagerClassifier(checkpoint.network, card.preprocessing, device))
    if checkpoint.vocabulary is None:
        raise CheckpointCorrupt("a language model without a vocabulary")
    runtime = EagerLanguageModel(cast(LanguageModel, checkpoint.network.to(device)), device)
    return ServedLanguageModel(located, card, runtime, checkpoint.vocabulary)


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
