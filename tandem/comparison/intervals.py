"""Confidence intervals of shares, and of the difference of two shares that were found on the same examples.

A share alone: Wilson's score interval (Wilson 1927, JASA 22:209–212), which stays within 0 and 1, and says something
where all examples are right. The paired difference: Tango's score interval (Tango 1998, Statistics in Medicine
17:891–908), recommended for paired shares by Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33:2850–2875)
since its coverage is near the nominal also for small samples and rare differences.
"""

import math
from collections.abc import Callable

from scipy.optimize import brentq
from scipy.stats import binomtest, norm

from tandem.comparison.evidence import Interval
from tandem.comparison.paired import PairedTable

CONFIDENCE = 0.95


def share_interval(count: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's interval of the share `count` / `total`, within 0 and 1; (0, 1) where `total` is 0."""
    if not total:
        return Interval(0.0, 1.0)
    found = binomtest(count, total).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def difference_interval(table: PairedTable, confidence: float = CONFIDENCE) -> Interval:
    """Return Tango's interval of accuracy b - accuracy a, within -1 and 1; (-1, 1) for an empty table."""
    total = table.num_examples
    if not total:
        return Interval(-1.0, 1.0)
    gained, lost = table.only_b_right, table.only_a_right
    limit = float(norm.ppf((1 + confidence) / 2))
    difference = (gained - lost) / total
    # The score falls from above the limit to below its negative as the difference that is supposed rises.
    low = _root(lambda supposed: _score(gained, lost, total, supposed) - limit, -1.0, difference)
    high = _root(lambda supposed: _score(gained, lost, total, supposed) + limit, difference, 1.0)
    return Interval(low, high)


def _score(gained: int, lost: int, total: int, supposed: float) -> float:
    """Return how many standard errors the observed difference is above the `supposed` one (Tango's equation 8)."""
    over = gained - lost - total * supposed
    if over == 0:
        return 0.0
    # The likeliest share of `lost` under the supposed difference, from a quadratic.
    square, linear = 2 * total, (2 * total - gained + lost) * supposed - gained - lost
    constant = -lost * supposed * (1 - supposed)
    likeliest = (math.sqrt(linear**2 - 4 * square * constant) - linear) / (2 * square)
    variance = total * (2 * likeliest + supposed * (1 - supposed))
    return over / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, over)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where `function` crosses 0 between `low` and `high`; the end that it doesn't reach, where it does not."""
    at_low, at_high = function(low), function(high)
    if not at_low > 0 > at_high:
        return low if at_low <= 0 else high
    return float(brentq(lambda each: max(-1e9, min(1e9, function(each))), low, high, xtol=1e-12))
