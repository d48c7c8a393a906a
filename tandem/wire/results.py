"""What the inference service answers, as plain frozen values; `wire.convert` puts them on the wire.

Those that have to do with images alone are in `tandem.comparison.results`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from tandem.comparison.results import ComparisonSummary, ModelVersion, ScoredClass, Timings


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
class Alternative:
    """A token with its log-probability in a place, in nats."""

    token: str
    token_id: int
    log_probability: float


@dataclass(frozen=True)
class TextPiece:
    """Words as they were drawn; the texts of all pieces, put one after another, are the completion.

    Of subwords, a word is the text that one adds, blanks and all: empty where it ends within a character.
    `log_probabilities` are the words' own, in nats, at temperature 1; `alternatives` are, for each word, those that
    the model held for the likeliest, best first, if they were asked for. `text_index` says of which text it is.
    """

    text: str
    words: tuple[str, ...]
    log_probabilities: tuple[float, ...] = ()
    alternatives: tuple[tuple[Alternative, ...], ...] = ()
    text_index: int = 0


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
    text_index: int = 0

    @property
    def perplexity(self) -> float:
        """Of the drawn words under the model: exp of the mean negative log-probability."""
        return math.exp(min(self.mean_negative_log_probability, 700.0))


@dataclass(frozen=True)
class Completion:
    """A text whole, and how it ended; what else there is of its words is as in TextPiece."""

    text: str
    words: tuple[str, ...]
    summary: GenerationSummary
    log_probabilities: tuple[float, ...] = ()
    alternatives: tuple[tuple[Alternative, ...], ...] = ()


@dataclass(frozen=True)
class TokenScore:
    """A token of a text with its log-probability after those before it, in nats; `alternatives` best first."""

    token: str
    token_id: int
    log_probability: float
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class ScoreSummary:
    """Over tokens, each of the same weight; `num_unknown` of them are `<unk>`."""

    num_tokens: int = 0
    sum_log_probability: float = 0.0
    num_unknown: int = 0

    @property
    def mean_log_probability(self) -> float:
        """In nats a token; 0 where there are none."""
        return self.sum_log_probability / self.num_tokens if self.num_tokens else 0.0

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(min(-self.mean_log_probability, 700.0))

    def __add__(self, other: "ScoreSummary") -> "ScoreSummary":
        return ScoreSummary(
            self.num_tokens + other.num_tokens,
            self.sum_log_probability + other.sum_log_probability,
            self.num_unknown + other.num_unknown,
        )


@dataclass(frozen=True)
class TextScore:
    """The tokens of one text, in order; `unknown_words` are those that the vocabulary lacks, each once."""

    tokens: tuple[TokenScore, ...]
    unknown_words: tuple[str, ...] = ()
    num_unknown: int = 0

    @property
    def summary(self) -> ScoreSummary:
        """Over its tokens."""
        total = math.fsum(token.log_probability for token in self.tokens)
        return ScoreSummary(len(self.tokens), total, self.num_unknown)


@dataclass(frozen=True)
class Scoring:
    """The answer of Score: one result for each text, in order."""

    model: ModelVersion
    results: tuple[TextScore, ...]
    timings: Timings

    @property
    def summary(self) -> ScoreSummary:
        """Over the tokens of all texts."""
        return sum((result.summary for result in self.results), ScoreSummary())


@dataclass(frozen=True)
class ModelInfo:
    """A model of the registry; `loaded` are the versions in memory, warm, and `loaded_bytes` what they take."""

    name: str
    kind: str
    latest: int
    aliases: dict[str, int]
    versions: tuple[int, ...]
    loaded: tuple[int, ...]
    # Version → why it could not be loaded.
    failed: dict[int, str] = field(default_factory=dict)
    out_of_service: bool = False
    loaded_bytes: int = 0


ChangeKind = Literal["published", "withdrawn", "alias_set", "alias_deleted", "loaded", "unloaded", "failed"]


@dataclass(frozen=True)
class ModelChange:
    """What has happened to a model; see ModelChange of the wire contract. Versions are 0 where there is none."""

    kind: ChangeKind
    name: str
    version: int = 0
    alias: str = ""
    previous_version: int = 0
    reason: str = ""


@dataclass(frozen=True)
class ModelsSnapshot:
    """All models as they are now: what changes follow on."""

    models: tuple[ModelInfo, ...]


@dataclass(frozen=True)
class LoadedModel:
    """The version that answers now, and how long it took to load; 0 where it was in memory."""

    model: ModelVersion
    load_ms: float


@dataclass(frozen=True)
class AliasMove:
    """A model after one of its aliases moved; `previous_version` is 0 where the alias is new."""

    model: ModelInfo
    previous_version: int


@dataclass(frozen=True)
class ShadowReport:
    """What a shadow of the calls of model `name` by `alias` has found; see Shadow of the wire contract.

    `summary` is of the images that both models saw, a the version that answers and b the candidate; without evidence
    while there are none. `ended` says why it ended, "" while it goes on.
    """

    name: str
    alias: str
    share: float
    age_s: float
    num_seen: int
    num_waiting: int
    # Reason → images.
    num_dropped: dict[str, int]
    ended: str
    summary: ComparisonSummary

    @property
    def num_shadowed(self) -> int:
        """Images that both models saw."""
        return self.summary.num_images


@dataclass(frozen=True)
class RuntimeDetails:
    """How Classify runs a network and why; the drifts are of probabilities, from eager's in float32."""

    name: str
    dtype: str
    reason: str
    max_probability_drift: float = 0.0
    mean_probability_drift: float = 0.0


@dataclass(frozen=True)
class ModelDetails:
    """One version: of a classifier its classes, image size and runtime; of a language model its vocabulary's size."""

    model: ModelVersion
    kind: str
    metrics: dict[str, float]
    num_parameters: int
    class_ids: tuple[str, ...] = field(default=())
    image_size: int = 0
    vocabulary_size: int = 0
    runtime: RuntimeDetails | None = None
    memory_bytes: int = 0
    devices: tuple[str, ...] = ()
