"""How far two models say the same, whether they are right or not: no labels are needed.

Cohen's kappa (Cohen 1960, Educational and Psychological Measurement 20:37–46) is the agreement beyond what two would
reach that name each class as often as these, but at random. The Jensen-Shannon divergence (Lin 1991, IEEE Transactions
on Information Theory 37:145–151) says how far two distributions are apart: 0 for equal ones, 1 bit for those without a
common class.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from tandem.comparison.classification import Indices


def cohens_kappa(named_a: Indices, named_b: Indices) -> float:
    """Return kappa of the classes (N,) that a and b name: 1 for agreement on all, 0 for that of chance.

    NaN for no examples, and where both name one and the same class throughout: chance agrees on all of them, too.
    """
    if not len(named_a):
        return math.nan
    observed = float((named_a == named_b).mean())
    num_classes = int(max(named_a.max(), named_b.max())) + 1
    shares_a, shares_b = (np.bincount(named, minlength=num_classes) / len(named) for named in (named_a, named_b))
    by_chance = float(shares_a @ shares_b)
    return (observed - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan


def divergences(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the Jensen-Shannon divergence (N,), in bits, of the distributions in each row of `a` and `b`, (N, C).

    Equal rows give 0 to the bit. Rows need not sum to 1 exactly; they are taken as they are.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    middle = (a + b) / 2
    bits = (rel_entr(a, middle) + rel_entr(b, middle)).sum(axis=1) / (2 * math.log(2))
    return np.asarray(np.clip(bits, 0.0, 1.0), dtype=np.float64)
