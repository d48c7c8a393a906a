"""Paired statistics of two classifiers on the same labelled examples. Pure, and free of NumPy: it starts at once.

McNemar's test asks whether the examples that one model alone gets right are as many as those that the other alone gets
right. Under the hypothesis that both err equally often, each discordant example is a fair coin, so that
`only_a_right` is Binomial(only_a_right + only_b_right, 1/2). The exact test sums that distribution's tails (Dietterich
1998, Neural Computation 10:1895–1923, section 3.1); the mid-p variant counts the observed table half, which brings the
error rate near its nominal one where the exact test is too cautious (Fagerland, Lydersen and Laake 2013, BMC Medical
Research Methodology 13:91).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedTable:
    """The 2×2 table of right and wrong answers of models a and b on the same examples, as counts."""

    both_right: int = 0
    only_a_right: int = 0
    only_b_right: int = 0
    both_wrong: int = 0

    @property
    def num_examples(self) -> int:
        """How many examples the table counts."""
        return self.both_right + self.only_a_right + self.only_b_right + self.both_wrong

    @property
    def accuracy_a(self) -> float:
        """Share of examples that a gets right, 0 to 1; NaN for an empty table."""
        return _share(self.both_right + self.only_a_right, self.num_examples)

    @property
    def accuracy_b(self) -> float:
        """Share of examples that b gets right, 0 to 1; NaN for an empty table."""
        return _share(self.both_right + self.only_b_right, self.num_examples)

    @property
    def exact_p(self) -> float:
        """Two-sided p of McNemar's exact test."""
        return mcnemar_exact_p(self.only_a_right, self.only_b_right)

    @property
    def mid_p(self) -> float:
        """Two-sided mid-p of McNemar's test."""
        return mcnemar_mid_p(self.only_a_right, self.only_b_right)

    def __add__(self, other: "PairedTable") -> "PairedTable":
        return PairedTable(
            self.both_right + other.both_right,
            self.only_a_right + other.only_a_right,
            self.only_b_right + other.only_b_right,
            self.both_wrong + other.both_wrong,
        )


def tabulate(pairs: Iterable[tuple[bool, bool]]) -> PairedTable:
    """Count `(a is right, b is right)` of each example."""
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for pair in pairs:
        counts[pair] += 1
    return PairedTable(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def mcnemar_exact_p(only_a_right: int, only_b_right: int) -> float:
    """Return the two-sided p of McNemar's exact test; 1 where the models never differ in being right."""
    fewer = min(only_a_right, only_b_right)
    return min(1.0, 2 * _lower_tail(fewer, only_a_right + only_b_right))


def mcnemar_mid_p(only_a_right: int, only_b_right: int) -> float:
    """Return the two-sided mid-p of McNemar's test: the exact p less the probability of the observed table.

    Where the two counts are equal the exact p is 1 by the cap, while the two tails and the table itself sum to
    1 + P(table): the mid-p is 1 there too.
    """
    fewer, total = min(only_a_right, only_b_right), only_a_right + only_b_right
    return min(1.0, 2 * _lower_tail(fewer, total) - _fair_coin(fewer, total))


def agreement(num_disagreements: int, num_examples: int) -> float:
    """Return the share of examples on which both models name the same class, 0 to 1; NaN for none."""
    return _share(num_examples - num_disagreements, num_examples)


def _share(count: int, total: int) -> float:
    return count / total if total else math.nan


def _lower_tail(count: int, total: int) -> float:
    """P(X ≤ count) for X of Binomial(total, 1/2)."""
    return math.fsum(_fair_coin(each, total) for each in range(count + 1))


def _fair_coin(count: int, total: int) -> float:
    """P(X = count) for X of Binomial(total, 1/2), through logarithms so that no power overflows."""
    log_ways = math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
    return math.exp(log_ways - total * math.log(2))
