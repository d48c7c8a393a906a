"""What stands in an exported file beside the network, so that the file alone is enough to serve it. Free of torch."""

import json
from collections.abc import Sequence
from typing import Any

from tandem.checkpoints.card import ClassifierCard, LanguageModelCard
from tandem.data.vocabulary import Vocabulary

# The one entry among a torch.export program's extra files.
EXTRA_FILE = "tandem.json"
INPUT, OUTPUT = "images", "logits"


def describe(card: ClassifierCard, label: str) -> dict[str, Any]:
    """Return what a user needs to serve the model `label`: its card, where it comes from, its input and output.

    The card has the classes in the order of the logits ({id, words}), the preprocessing, and the run.
    """
    size = card.preprocessing.image_size
    how = "decode to RGB; shorter side to resize (bilinear, antialiased); centre image_size square; /255; - mean; / std"
    return {
        "model": label,
        **card.model_dump(mode="json"),
        "input": {"name": INPUT, "dtype": "float32", "shape": ["B", 3, size, size], "preprocessing": how},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["B", len(card.classes)]},
    }


def after(name: str) -> str:
    """Return the name of the output that is the state `name` after the tokens."""
    return f"{name}_after"


def describe_language_model(
    card: LanguageModelCard,
    label: str,
    vocabulary: Vocabulary,
    state: Sequence[tuple[str, str, tuple[int, ...]]],
    dynamic_time: bool,
) -> dict[str, Any]:
    """Return what a user needs to serve the model `label`: its card, vocabulary, inputs and outputs.

    `state` are the name, dtype and shape (-1: B) of each tensor that is handed on from call to call; they are zeros
    before the first token of a text, which `<eos>` should be.
    """
    time = "T" if dynamic_time else 1
    tensors = [
        {"name": name, "dtype": dtype, "shape": ["B" if size == -1 else size for size in shape]}
        for name, dtype, shape in state
    ]
    return {
        **card.model_dump(mode="json"),
        "architecture": card.model,
        # As in the file of a classifier; the card calls its network so.
        "model": label,
        "vocabulary": {"tokenizer": vocabulary.tokenizer, "tokens": list(vocabulary.tokens)},
        "inputs": [{"name": "token_ids", "dtype": "int64", "shape": ["B", time]}, *tensors],
        "outputs": [
            {"name": OUTPUT, "dtype": "float32", "shape": ["B", time, len(vocabulary)]},
            *({**each, "name": after(str(each["name"]))} for each in tensors),
        ],
    }


def as_texts(document: dict[str, Any]) -> dict[str, str]:
    """Return `document` as ONNX metadata holds it: text as it is, all else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in document.items()
    }
