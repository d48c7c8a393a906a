"""What models say of images, one model or two, as plain frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem.comparison.evidence import Evidence
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
class PairResult:
    """One image through two models; `label` is the id of its true class, empty where that is unknown.

    `divergence` is how far apart the two predictions are, in bits, 0 to 1 (`agreement.divergences`).
    """

    name: str
    label: str = ""
    a: tuple[ScoredClass, ...] = ()
    b: tuple[ScoredClass, ...] = ()
    agree: bool = False
    error: str = ""
    divergence: float = 0.0


@dataclass(frozen=True)
class ComparisonSummary:
    """Counts over the images that both models answered; `labelled` is None where no label was known.

    `evidence` is None where it has to be computed anew (`weighing.weigh_pairs`): of summaries that were added up.
    """

    a: ModelVersion
    b: ModelVersion
    num_images: int
    num_disagreements: int
    num_errors: int
    labelled: PairedTable | None
    evidence: Evidence | None = None

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
    """The answer of Compare: a result for each image. Of CompareDataset: those that differ or failed.

    `images` are encoded images of disagreements, by their names, as far as CompareDataset was asked for them.
    """

    results: tuple[PairResult, ...]
    summary: ComparisonSummary
    timings: Timings
    images: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def disagreements(self) -> tuple[PairResult, ...]:
        """The images that the two models name differently."""
        return tuple(result for result in self.results if not result.agree and not result.error)

    @property
    def ranked(self) -> tuple[PairResult, ...]:
        """The same, those first whose predictions are furthest apart."""
        return tuple(sorted(self.disagreements, key=lambda result: -result.divergence))

    @property
    def failures(self) -> tuple[PairResult, ...]:
        """The images that could not be decoded."""
        return tuple(result for result in self.results if result.error)
