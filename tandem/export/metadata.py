"""What stands in an exported file beside the network, so that the file alone is enough to serve it. Free of torch."""

import json
from typing import Any

from tandem.checkpoints.card import ClassifierCard

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


def as_texts(document: dict[str, Any]) -> dict[str, str]:
    """Return `document` as ONNX metadata holds it: text as it is, all else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in document.items()
    }
