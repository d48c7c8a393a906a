"""What the inference service answers, as plain frozen values; `wire.convert` puts them on the wire."""

import math
from dataclasses import dataclass, field

from tandem.comparison.paired import PairedTable


@dataclass(frozen=True)
class ModelVersion:
    """The version that answered; `version` is 0 and `name` empty for a checkpoint named by its run."""

    name: str
    version: int
    run_id: str
    step: int
    architecture: str
    dtype: str

    @property
    def label(self) -> str:
        """The reference that names just this version."""
        return f"{self.name}:{self.version}" if self.name else f"run:{self.run_id}/{self.step}"


@dataclass(frozen=True)
class Timings:
    """Where the time of a call went, in milliseconds."""

    decode_ms: float = 0.0
    queue_ms: float = 0.0
    compute_ms: float = 0.0

    def __add__(self, other: "Timings") -> "Timings":
        return Timings(
            self.decode_ms + other.decode_ms, self.queue_ms + other.queue_ms, self.compute_ms + other.compute_ms
        )


@dataclass(frozen=True)
class ScoredClass:
    """A class with its probability, 0 to 1; `index` is its place in the model's output."""

    index: int
    id: str
    words: str
    probability: float


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
class PairResult:
    """One image through two models; `label` is the id of its true class, empty where that is unknown."""

    name: str
    label: str = ""
    a: tuple[ScoredClass, ...] = ()
    b: tuple[ScoredClass, ...] = ()
    agree: bool = False
    error: str = ""


@dataclass(frozen=True)
class ComparisonSummary:
    """Counts over the images that both models answered; `labelled` is None where no label was known."""

    a: ModelVersion
    b: ModelVersion
    num_images: int
    num_disagreements: int
    num_errors: int
    labelled: PairedTable | None

    def __add__(self, other: "ComparisonSummary") -> "ComparisonSummary":
        """Return the summary of both parts; the models are the same."""
        tables = [table for table in (self.labelled, other.labelled) if table is not None]
        return ComparisonSummary(
            a=self.a,
            b=self.b,
            num_images=self.num_images + other.num_images,
            num_disagreements=self.num_disagreements + other.num_disagreements,
            num_errors=self.num_errors + other.num_errors,
            labelled=sum(tables, PairedTable()) if tables else None,
        )


@dataclass(frozen=True)
class Comparison:
    """The answer of Compare: a result for each image. Of CompareDataset: those that differ or failed."""

    results: tuple[PairResult, ...]
    summary: ComparisonSummary
    timings: Timings

    @property
    def disagreements(self) -> tuple[PairResult, ...]:
        """The images that the two models name differently."""
        return tuple(result for result in self.results if not result.agree and not result.error)

    @property
    def failures(self) -> tuple[PairResult, ...]:
        """The images that could not be decoded."""
        return tuple(result for result in self.results if result.error)


@dataclass(frozen=True)
class ComparisonProgress:
    """How far CompareDataset is."""

    num_done: int
    num_images: int


@dataclass(frozen=True)
class TextPiece:
    """Words as they were drawn; the texts of all pieces, put one after another, are the completion."""

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
