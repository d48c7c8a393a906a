"""The classes of two classifiers, matched by their ids: each may order them differently, and know others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.comparison.classification import Indices
from tandem.data.manifest import ClassName


@dataclass(frozen=True)
class MatchedClasses:
    """All classes that either model knows, those of a first; `place_a` (Ca,) and `place_b` (Cb,) are where each
    model's classes are among them."""

    all: tuple[ClassName, ...]
    place_a: Indices
    place_b: Indices

    @classmethod
    def of(cls, a: Sequence[ClassName], b: Sequence[ClassName]) -> "MatchedClasses":
        """Match the classes of two models."""
        places = {each.id: place for place, each in enumerate(a)}
        more = [each for each in b if each.id not in places]
        places |= {each.id: len(a) + number for number, each in enumerate(more)}
        return cls(
            (*a, *more),
            np.arange(len(a), dtype=np.int64),
            np.array([places[each.id] for each in b], dtype=np.int64),
        )

    @property
    def only_in_a(self) -> tuple[ClassName, ...]:
        """The classes that b does not know."""
        known = set(self.place_b.tolist())
        return tuple(each for place, each in enumerate(self.all[: len(self.place_a)]) if place not in known)

    @property
    def only_in_b(self) -> tuple[ClassName, ...]:
        """The classes that a does not know."""
        return self.all[len(self.place_a) :]

    @property
    def num_shared(self) -> int:
        """How many classes both know; 0 makes a comparison of answers meaningless."""
        return len(self.place_a) + len(self.place_b) - len(self.all)

    def index(self) -> dict[str, int]:
        """Return class id → place."""
        return {each.id: place for place, each in enumerate(self.all)}

    def spread(self, probabilities: NDArray[np.float32], places: Indices) -> NDArray[np.float32]:
        """Return `probabilities` (N, C) of the classes at `places` (C,) as columns of all classes; the rest is 0."""
        spread = np.zeros((len(probabilities), len(self.all)), np.float32)
        spread[:, places] = probabilities
        return spread
