"""Models with random weights, to measure with: as fast as trained ones, and there in a second."""

from typing import Any

import torch
from torch import nn

from tandem.checkpoints.card import ClassifierCard, LanguageModelCard, Preprocessing
from tandem.checkpoints.files import MODEL_FILE, VOCABULARY_FILE, WEIGHTS_FILE, step_directory, write_checkpoint
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.tensors import build_network, to_bytes
from tandem.data.manifest import ClassName
from tandem.data.vocabulary import build_vocabulary
from tandem.models.weights import bare_state
from tandem.volume import Volume

NAME = "bench"
SIDE, NUM_CLASSES = 64, 200
# Of WikiText-2.
VOCABULARY_SIZE = 33_278


def publish_classifier(volume: Volume) -> None:
    """Publish a ResNet-18 in the shape of Tiny-ImageNet: 64 px, 200 classes."""
    classes = tuple(ClassName(id=f"n{number:08}", words=f"class {number}") for number in range(NUM_CLASSES))
    preprocessing = Preprocessing(resize=SIDE, image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    card = ClassifierCard(**_common(), arch="resnet18", classes=classes, preprocessing=preprocessing)
    _publish(volume, "classifier", card, {})


def publish_language_model(volume: Volume) -> None:
    """Publish an LSTM of the well-known example's size: 200 wide, two layers, 33,278 words."""
    words = build_vocabulary([" ".join(f"word{number}" for number in range(VOCABULARY_SIZE - 2))], "words")
    card = LanguageModelCard(
        **_common(),
        model="LSTM",
        vocabulary_size=len(words),
        embedding_size=200,
        hidden_size=200,
        num_layers=2,
        num_heads=2,
        dropout=0.2,
        tied=False,
        context_length=35,
    )
    _publish(volume, "language_model", card, {VOCABULARY_FILE: words.to_json()})


def _common() -> dict[str, Any]:
    return {
        "run_id": NAME,
        "epoch": 1,
        "step": 1,
        "seed": 0,
        "num_parameters": 1,
        "dataset": "made up",
        "dataset_fingerprint": "0" * 64,
        "metrics": {"val_loss": 1.0},
        "library_versions": {"torch": torch.__version__},
    }


def _publish(volume: Volume, kind: str, card: ClassifierCard | LanguageModelCard, files: dict[str, bytes]) -> None:
    torch.manual_seed(0)
    network: nn.Module = build_network(card)
    checkpoint = step_directory(volume.run(card.run_id), card.step)
    weights = to_bytes(bare_state(network))
    write_checkpoint(checkpoint, {MODEL_FILE: card.model_dump_json().encode(), WEIGHTS_FILE: weights, **files})
    Registry(volume).publish(NAME, kind, card.run_id, checkpoint, dict(card.metrics))
