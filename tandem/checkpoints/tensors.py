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

_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: its network on the CPU in eval mode, its card, and its vocabulary."""

    card: Card
    network: nn.Module
    vocabulary: Vocabulary | None


def bare_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `network` on the CPU by the names of the bare module, a shared tensor once."""
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in network.state_dict().items():
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        # Tied weights share storage; safetensors stores each storage once, and loading ties them again.
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        state[name] = tensor.detach().cpu().contiguous()
    return state


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return `tensors` as a safetensors file, in order of name, so that equal tensors give equal bytes."""
    return safetensors.torch.save(dict(sorted(tensors.items())))


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """Read a safetensors file; raise CheckpointCorrupt if it is none."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointCorrupt(f"the tensors can't be read: {error}") from error


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` into `network`; raise CheckpointCorrupt where names or shapes don't fit."""
    own = network.state_dict()
    tied = _tied_names(network)
    missing = [name for name in own if name not in tensors and tied.get(name, name) not in tensors]
    unexpected = [name for name in tensors if name not in own]
    wrong = [name for name in tensors if name in own and tensors[name].shape != own[name].shape]
    for problem, names in (("lack", missing), ("have an unknown", unexpected), ("have another shape of", wrong)):
        if names:
            raise CheckpointCorrupt(f"the weights {problem} {names[0]} (and {len(names) - 1} more)")
    network.load_state_dict(dict(tensors), strict=False)


def _tied_names(network: nn.Module) -> dict[str, str]:
    """Map each name of a shared parameter to the first name it has."""
    first: dict[int, str] = {}
    names = network.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in names}


def build_network(card: Card) -> nn.Module:
    """Return the freshly initialised network that `card` describes."""
    if isinstance(card, ClassifierCard):
        return build_classifier(card.arch, len(card.classes), card.preprocessing.image_size)
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
