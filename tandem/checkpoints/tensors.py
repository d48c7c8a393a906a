"""Tensors to checkpoints and back: safetensors only, so that no reader ever unpickles."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tandem.checkpoints.card import Card, ClassifierCard, parse_card
from tandem.checkpoints.files import MODEL_FILE, VOCABULARY_FILE, WEIGHTS_FILE, read_verified
from tandem.data.vocabulary import Vocabulary
from tandem.errors import CheckpointCorrupt
from tandem.models.classifiers import build_classifier
from tandem.models.language_models import LanguageModelShape, build_language_model
from tandem.models.weights import load_weights


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: its network on the CPU in eval mode, its card, and its vocabulary."""

    card: Card
    network: nn.Module
    vocabulary: Vocabulary | None


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return `tensors` as a safetensors file, in order of name, so that equal tensors give equal bytes."""
    return safetensors.torch.save(dict(sorted(tensors.items())))


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """Read a safetensors file; raise CheckpointCorrupt if it is none."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointCorrupt(f"the tensors can't be read: {error}") from error


def build_network(card: Card) -> nn.Module:
    """Return the freshly initialised network that `card` describes."""
    if isinstance(card, ClassifierCard):
        return build_classifier(card.arch, len(card.classes), card.preprocessing.image_size, card.stem)
    return build_language_model(
        LanguageModelShape(
            model=card.model,
            vocabulary_size=card.vocabulary_size,
            embedding_size=card.embedding_size,
            hidden_size=card.hidden_size,
            num_layers=card.num_layers,
            num_heads=card.num_heads,
            dropout=card.dropout,
            tied=card.tied,
            context_length=card.context_length,
        )
    )


def load_checkpoint(checkpoint: Path, digest: str | None = None) -> Checkpoint:
    """Verify and load the checkpoint directory `checkpoint`; raise CheckpointCorrupt where anything is wrong.

    `digest` is the SHA-256 of the manifest that the registry recorded.
    """
    files = read_verified(checkpoint, (MODEL_FILE, WEIGHTS_FILE, VOCABULARY_FILE), digest)
    card = parse_card(files[MODEL_FILE])
    vocabulary = _vocabulary(files.get(VOCABULARY_FILE))
    if card.kind == "language_model" and (vocabulary is None or len(vocabulary) != card.vocabulary_size):
        raise CheckpointCorrupt(f"{checkpoint} is a language model without a vocabulary of its size")
    network = build_network(card)
    load_weights(network, from_bytes(files[WEIGHTS_FILE]))
    return Checkpoint(card, network.eval().requires_grad_(False), vocabulary)


def _vocabulary(data: bytes | None) -> Vocabulary | None:
    if data is None:
        return None
    try:
        return Vocabulary.from_json(data)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{VOCABULARY_FILE} can't be read: {error}") from error
