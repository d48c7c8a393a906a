import math

import pytest
from scipy.stats import binomtest

from tandem.comparison.paired import PairedTable, agreement, mcnemar_exact_p, mcnemar_mid_p, tabulate


def test_table_counts_each_kind_of_outcome() -> None:
    pairs = [(True, True)] * 4 + [(True, False)] * 3 + [(False, True)] * 2 + [(False, False)]
    table = tabulate(pairs)
    assert table == PairedTable(both_right=4, only_a_right=3, only_b_right=2, both_wrong=1)
    assert table.num_examples == 10
    assert table.accuracy_a == 0.7
    assert table.accuracy_b == 0.6
    assert table + table == tabulate(pairs * 2)


# By hand: for 1 against 9, P(X ≤ 1) of 10 fair coins is 11/1024, and P(X = 1) is 10/1024.
@pytest.mark.parametrize(
    ("only_a", "only_b", "exact", "mid"),
    [
        (1, 9, 22 / 1024, 12 / 1024),
        (9, 1, 22 / 1024, 12 / 1024),
        (0, 5, 2 / 32, 1 / 32),
        (2, 3, 1.0, 1 - 10 / 32),
        (3, 3, 1.0, 1.0),
        (0, 0, 1.0, 1.0),
        (0, 1, 1.0, 0.5),
    ],
)
def test_mcnemar_against_numbers_worked_by_hand(only_a: int, only_b: int, exact: float, mid: float) -> None:
    assert mcnemar_exact_p(only_a, only_b) == pytest.approx(exact, rel=1e-12)
    assert mcnemar_mid_p(only_a, only_b) == pytest.approx(mid, rel=1e-12)


@pytest.mark.parametrize(("only_a", "only_b"), [(3, 8), (40, 61), (250, 300), (4000, 4300)])
def test_exact_p_is_scipys(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert mcnemar_exact_p(only_a, only_b) == pytest.approx(expected, rel=1e-8)


def test_agreement_is_a_share() -> None:
    assert agreement(3, 12) == 0.75
    assert math.isnan(agreement(0, 0))
    assert math.isnan(PairedTable().accuracy_a)
