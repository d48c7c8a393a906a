"""What the inference service answers, as plain frozen values; `wire.convert` puts them on the wire.

Those that have to do with images alone are in `tandem.comparison.results`.
"""

import math
from dataclasses import dataclass, field

from tandem.comparison.results import ModelVersion, ScoredClass, Timings


@dataclass(frozen=True)
class ImageResult:
    """The best classes of one image, best first; or the `error` for which there are none."""

    name: str
    top_k: tuple[ScoredClass, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Classification:
    """The answer of Classify: one result for each image, in order."""

    model: ModelVersion
    results: tuple[ImageResult, ...]
    timings: Timings


@dataclass(frozen=True)
class ComparisonProgress:
    """How far CompareDataset is."""

    num_done: int
    num_images: int


@dataclass(frozen=True)
class TextPiece:
    """Words as they were drawn; the texts of all pieces, put one after another, are the completion.

    Of subwords, a word is the text that one adds, blanks and all: empty where it ends within a character.
    """

    text: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class GenerationSummary:
    """How a generation ended. `mean_negative_log_probability` is in nats a word, at temperature 1."""

    model: ModelVersion
    num_prompt_tokens: int
    num_words: int
    seed: int
    finish_reason: str
    unknown_words: tuple[str, ...]
    mean_negative_log_probability: float
    timings: Timings

    @property
    def perplexity(self) -> float:
        """Of the drawn words under the model: exp of the mean negative log-probability."""
        return math.exp(min(self.mean_negative_log_probability, 700.0))


@dataclass(frozen=True)
class ModelInfo:
    """A model of the registry; `loaded` are the versions that are in memory, warm."""

    name: str
    kind: str
    latest: int
    aliases: dict[str, int]
    versions: tuple[int, ...]
    loaded: tuple[int, ...]


@dataclass(frozen=True)
class ModelDetails:
    """One version: of a classifier its classes and image size, of a language model its vocabulary's size."""

    model: ModelVersion
    kind: str
    metrics: dict[str, float]
    num_parameters: int
    class_ids: tuple[str, ...] = field(default=())
    image_size: int = 0
    vocabulary_size: int = 0
