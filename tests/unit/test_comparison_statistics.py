"""Intervals, agreement, classes and tokens: against statsmodels, SciPy and published examples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from tandem.comparison import token_differences
from tandem.comparison.agreement import cohens_kappa, divergences
from tandem.comparison.by_class import adjust, class_differences
from tandem.comparison.intervals import difference_interval, share_interval
from tandem.comparison.paired import PairedTable
from tandem.comparison.token_differences import block_means, compare_losses, largest_differences

COUNTS = st.integers(0, 300)
TABLES = st.builds(PairedTable, COUNTS, COUNTS, COUNTS, COUNTS)
# Airway hyper-responsiveness of 21 children before and after a transplantation (Bentur et al. 2009), the example of
# Fagerland, Lydersen and Laake 2014: 1 before and after, 1 before alone, 7 after alone, 12 never.
AIRWAYS = PairedTable(1, 1, 7, 12)


def test_the_paired_difference_of_a_published_example() -> None:
    assert difference_interval(AIRWAYS) == pytest.approx((0.026, 0.517), abs=5e-4)
    assert (AIRWAYS.exact_p, AIRWAYS.mid_p) == pytest.approx((0.070, 0.039), abs=5e-4)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # Without a discordant pair both ends are z² / (n + z²) away.
        (PairedTable(5, 0, 0, 5), (-0.27753, 0.27753)),
        (PairedTable(0, 0, 5, 0), (0.13104, 1.0)),
        (PairedTable(0, 1, 0, 0), (-1.0, 0.58690)),
        (PairedTable(), (-1.0, 1.0)),
    ],
)
def test_the_paired_difference_at_its_ends(table: PairedTable, expected: tuple[float, float]) -> None:
    assert difference_interval(table) == pytest.approx(expected, abs=1e-5)


@given(TABLES)
def test_the_paired_difference_is_in_its_interval_and_mirrors(table: PairedTable) -> None:
    low, high = difference_interval(table)
    assert -1 <= low <= high <= 1
    if table.num_examples:
        assert low - 1e-9 <= table.accuracy_b - table.accuracy_a <= high + 1e-9
    mirrored = PairedTable(table.both_right, table.only_b_right, table.only_a_right, table.both_wrong)
    assert difference_interval(mirrored) == pytest.approx((-high, -low), abs=1e-9)


def test_the_paired_difference_covers_what_it_should() -> None:
    """Of 2,000 samples of 60 pairs with known shares about 95 % hold the true difference (Tango 1998, table II)."""
    chance = np.random.default_rng(1)
    samples = chance.multinomial(60, [0.6, 0.05, 0.15, 0.2], size=2000)
    found = [difference_interval(PairedTable(*map(int, sample))) for sample in samples]
    assert 0.94 <= np.mean([low <= 0.1 <= high for low, high in found]) <= 0.97


@given(COUNTS, COUNTS)
def test_a_share(count: int, more: int) -> None:
    total = count + more
    expected = proportion_confint(count, total, method="wilson") if total else (0, 1)
    assert share_interval(count, total) == pytest.approx(expected, abs=1e-9)


@given(TABLES)
def test_mcnemar(table: PairedTable) -> None:
    cells = [[table.both_right, table.only_a_right], [table.only_b_right, table.both_wrong]]
    assert table.exact_p == pytest.approx(mcnemar(cells, exact=True).pvalue, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_kappa(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    cells = np.zeros((4, 4))
    np.add.at(cells, (a, b), 1)
    found = cohens_kappa(a, b)
    if len({*a.tolist(), *b.tolist()}) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(reference_kappa(cells).kappa, abs=1e-9)


def test_kappa_of_nothing() -> None:
    assert math.isnan(cohens_kappa(np.zeros(0, np.int64), np.zeros(0, np.int64)))


def test_divergence() -> None:
    chance = np.random.default_rng(2)
    a, b = chance.dirichlet(np.full(7, 0.3), size=(2, 50)).astype(np.float32)
    expected = [jensenshannon(p.astype(float), q.astype(float), base=2) ** 2 for p, q in zip(a, b, strict=True)]
    assert divergences(a, b) == pytest.approx(expected, abs=1e-6)
    assert (divergences(a, a) == 0).all()
    assert divergences(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])).tolist() == [1.0]
    assert (divergences(a, b) == divergences(b, a)).all()


@given(st.lists(st.floats(0, 1), max_size=50))
def test_adjusted_p(p_values: list[float]) -> None:
    expected = multipletests(p_values, method="fdr_bh")[1].tolist() if p_values else []
    assert adjust(p_values) == pytest.approx(expected, abs=1e-12)


def test_classes() -> None:
    labels = np.repeat([0, 2], [40, 40])
    right_a, right_b = np.ones(80, bool), np.ones(80, bool)
    right_a[:12] = False
    right_b[40:41] = False
    better, same = class_differences("xyz", labels, right_a, right_b)
    assert (better.id, better.table) == ("x", PairedTable(28, 0, 12, 0))
    assert better.difference == pytest.approx(0.3)
    assert better.p == pytest.approx(2**-12)
    assert better.adjusted_p == pytest.approx(2 * 2**-12)
    assert (same.id, same.table.only_a_right, same.p, same.adjusted_p) == ("z", 1, 0.5, 0.5)
    assert class_differences("xyz", labels[:0], right_a[:0], right_b[:0]) == ()


def test_tokens_of_a_better_model() -> None:
    chance = np.random.default_rng(3)
    a = chance.gamma(2.0, 2.5, size=100_000).astype(np.float32)
    b = (a - 0.02 + chance.normal(0, 0.5, size=len(a))).astype(np.float32)
    found = compare_losses(a, b)
    assert found.difference == pytest.approx(float(np.mean(b, dtype=np.float64) - np.mean(a, dtype=np.float64)))
    assert found.interval.low < -0.02 < found.interval.high < 0
    assert found.perplexity_b / found.perplexity_a == pytest.approx(math.exp(found.difference))
    assert found.ratio == pytest.approx([math.exp(end) for end in found.interval])
    assert (found.num_tokens, found.block_tokens) == (100_000, 256)
    assert compare_losses(a, b) == found, "the same text gives the same interval"


def test_tokens_that_are_alike_or_few() -> None:
    one = np.array([2.5], np.float32)
    assert compare_losses(one, one + 1).interval == (-math.inf, math.inf)
    same = np.array([1.0, 3.0, 2.0], np.float32)
    assert compare_losses(same, same).interval == (0.0, 0.0)
    assert compare_losses(np.arange(400, dtype=np.float32), np.zeros(400, np.float32)).block_tokens == 10
    for wrong in (np.zeros(0, np.float32), np.zeros(2, np.float32)):
        with pytest.raises(ValueError, match="not of the same tokens"):
            compare_losses(wrong, same if len(wrong) else wrong)


@settings(deadline=None)
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=200), st.integers(1, 50))
def test_blocks_hold_all(values: list[float], length: int) -> None:
    means = block_means(np.array(values), length)
    counts = np.diff(np.append(np.arange(len(means)) * len(values) // len(means), len(values)))
    assert set(counts) <= {len(values) // len(means), len(values) // len(means) + 1}
    assert float((means * counts).sum()) == pytest.approx(sum(values), abs=1e-9)


def test_the_interval_holds_for_tokens_that_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences with a correlation of 0.9 to the next: blocks cover the truth, single tokens would by far not."""
    monkeypatch.setattr(token_differences, "NUM_RESAMPLES", 499)
    chance = np.random.default_rng(4)

    def covered() -> bool:
        noise = chance.normal(size=12_000)
        for place in range(1, len(noise)):
            noise[place] += 0.9 * noise[place - 1]
        low, high = compare_losses(np.zeros(len(noise), np.float32), noise.astype(np.float32)).interval
        return low <= 0 <= high

    blocks = np.mean([covered() for _ in range(80)])
    monkeypatch.setattr(token_differences, "BLOCK_TOKENS", 1)
    monkeypatch.setattr(token_differences, "_MIN_BLOCK_TOKENS", 1)
    singles = np.mean([covered() for _ in range(30)])
    assert blocks > 0.87
    assert singles < 0.6


def test_the_tokens_that_differ_most() -> None:
    a, b = np.array([1, 5, 2, 2], np.float32), np.array([1, 1, 4, 0], np.float32)
    assert largest_differences(a, b, 3) == [1, 2, 3]


@pytest.mark.parametrize("num_tokens", [1, 2, 10, 79])
def test_a_text_of_few_tokens_has_no_interval(num_tokens: int) -> None:
    found = compare_losses(np.full(num_tokens, 4.0, np.float32), np.linspace(3.0, 3.5, num_tokens, dtype=np.float32))
    assert not found.has_interval
    assert found.interval == (-math.inf, math.inf)
    assert found.ratio == (0.0, math.inf)
    assert compare_losses(np.ones(num_tokens, np.float32), np.ones(num_tokens, np.float32)).interval == (0.0, 0.0)


@pytest.mark.filterwarnings("ignore")
def test_what_so_many_resamples_can_not_tell_has_no_interval() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 400)).astype(np.float32)
    assert compare_losses(a, b).has_interval
    assert not compare_losses(a, b, confidence=1 - 1e-17).has_interval


def test_losses_of_networks_that_have_diverged_are_numbers_still() -> None:
    found = compare_losses(np.full(400, 1.0, np.float32), np.full(400, 900.0, np.float32))
    assert math.isfinite(found.perplexity_b)
    assert math.isfinite(found.share)


def test_the_error_of_a_gate_on_a_short_text_is_about_its_level() -> None:
    generator = np.random.default_rng(1)

    def passes() -> bool:
        return compare_losses(*generator.normal(size=(2, 80)).astype(np.float32)).interval.high < 0

    # 2.5 % at one end; of 400 with that chance more than 22 would be 1 in 1000.
    assert sum(passes() for _ in range(400)) <= 22
