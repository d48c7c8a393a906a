"""One shadow: whose calls a candidate sees as well, which of them, and what the two models say of their images.

Plain state, without tasks and devices, and free of the models: it holds them weakly, so that they leave the memory when
others need their room. `shadows` feeds it.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import ref

from torch import Tensor

from services.inference.aside import Aside
from services.inference.loading import ServedClassifier
from services.inference.residents import key_of
from services.inference.tally import Tally, predictions
from tandem.checkpoints.references import LATEST, ModelReference
from tandem.wire.limits import MAX_SHADOW_IMAGES
from tandem.wire.results import ShadowReport

# Why images of chosen calls are not seen by the candidate, as `Shadow.num_dropped` of the contract tells them.
REASONS = ("full", "busy", "slow", "failed", "ended")
# A call that comes while a batch of a shadow runs waits for it: of so many images at the most, and of fewer where they
# take longer than this.
MAX_BATCH = 8
BATCH_S = 0.025
# So many batches in a row that fail or take too long end a shadow.
MAX_TROUBLES = 5


@dataclass(frozen=True)
class Terms:
    """Whose calls, and which share of them, above 0 and at most 1."""

    name: str
    alias: str
    share: float

    @property
    def label(self) -> str:
        """As callers write it."""
        return f"{self.name}@{self.alias}"

    @property
    def reference(self) -> ModelReference:
        """As the registry has it."""
        return ModelReference(self.name, None, self.alias)

    @property
    def written(self) -> tuple[str, ...]:
        """All ways in which callers write it."""
        return (self.label, self.name) if self.alias == LATEST else (self.label,)


class Shadow:
    """Counts are of images. All is used on one event loop, but for `record` and `report`, which take milliseconds."""

    def __init__(self, terms: Terms, production: ServedClassifier, candidate: ServedClassifier) -> None:
        self.terms = terms
        self.key = key_of(production.located)
        self.production, self.candidate = ref(production), ref(candidate)
        self.preprocessings = production.card.preprocessing, candidate.card.preprocessing
        self.aside = Aside(f"shadow-{terms.label}")
        # One at first: how long they take is not known yet.
        self.batch_size = 1
        self.num_seen = self.num_chosen = self.num_recorded = 0
        self.num_dropped = dict.fromkeys(REASONS, 0)
        self.ended = ""
        self._tally = Tally(production, candidate)
        self._lock = threading.Lock()
        self._begun_at = time.monotonic()
        self._ended_at: float | None = None
        self._owed = 0.0
        self._num_troubles = 0

    @property
    def labels(self) -> tuple[str, str]:
        """The version that answers, and the candidate."""
        return self._tally.a.label, self._tally.b.label

    def chooses(self, num_images: int) -> bool:
        """Count a call that was answered, and return whether it is one of the share."""
        self.num_seen += num_images
        # Evenly, not by chance: what is owed is carried over.
        self._owed += self.terms.share
        if self._owed < 1:
            return False
        self._owed -= 1
        self.num_chosen += num_images
        return True

    def seen_at(self, production: ServedClassifier) -> None:
        """Note where the version that answers is; it may have left the memory and come again."""
        if self.production() is not production:
            self.production = ref(production)

    def drop(self, num_images: int, reason: str) -> None:
        """Count images that the candidate will not see, for one of REASONS."""
        self.num_dropped[reason] += num_images

    def trouble(self, num_images: int, reason: str) -> None:
        """Drop the images of a batch for "slow" or "failed"; the last of several such in a row ends the shadow."""
        self.drop(num_images, reason)
        self.batch_size = 1
        self._num_troubles += 1
        if self._num_troubles == MAX_TROUBLES:
            what = "took too long" if reason == "slow" else "failed (the server's log says how)"
            self.end(f"{MAX_TROUBLES} batches in a row came to nothing; the last one {what}")

    def record(self, a: Tensor, b: Tensor, labels: Sequence[str]) -> None:
        """Record the logits (N, Ca) and (N, Cb) of N images, with the ids of their true classes, "" where unknown."""
        with self._lock:
            self._tally.add(predictions(a), predictions(b), labels)

    def recorded(self, num_images: int, slower_s: float) -> None:
        """Count a batch that is recorded, for which the slower network took `slower_s`."""
        self.num_recorded += num_images
        self._num_troubles = 0
        if slower_s < BATCH_S / 2:
            self.batch_size = min(MAX_BATCH, 2 * self.batch_size)
        elif slower_s > BATCH_S:
            self.batch_size = max(1, self.batch_size // 2)
        if self.num_recorded >= MAX_SHADOW_IMAGES:
            self.end(f"it has seen {self.num_recorded:,} images, which are enough")

    def end(self, reason: str) -> None:
        """Choose and record no more; the first reason is told."""
        if not self.ended:
            self.ended, self._ended_at = reason, time.monotonic()
            self.aside.close()

    def report(self) -> ShadowReport:
        """Return what was found so far; of a million images it takes a part of a second."""
        with self._lock:
            summary = self._tally.summary()
        ended_at = time.monotonic() if self._ended_at is None else self._ended_at
        # By what the summary has: a batch is recorded before it is counted.
        num_done = summary.num_images + sum(self.num_dropped.values())
        return ShadowReport(
            self.terms.name,
            self.terms.alias,
            self.terms.share,
            ended_at - self._begun_at,
            self.num_seen,
            max(0, self.num_chosen - num_done),
            dict(self.num_dropped),
            self.ended,
            # Of nothing there is no verdict.
            summary if summary.num_images else replace(summary, evidence=None),
        )
