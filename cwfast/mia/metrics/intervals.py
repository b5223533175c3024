"""Intervals without resampling: Clopper-Pearson for a share, DeLong for an AUC."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from cwfast.mia._inputs import Array, Floats
from cwfast.mia.metrics.roc import area, curve_of, pair, rank


class AucInterval(NamedTuple):
    """An AUC, its standard error and a normal interval within [0, 1]."""

    auc: float
    low: float
    high: float
    std: float


def clopper_pearson(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high): P[Bin(n, low) >= k] = P[Bin(n, high) <= k] = (1 - confidence) / 2; never too narrow.

    For one-sided bounds at level 1 - a, ask for ``confidence = 1 - 2 a`` and take one of them.

    Args:
        successes: k, 0 to ``trials``: of a TPR at a threshold that was fixed beforehand, the members above it.
        trials: n, at least 1.
        confidence: in (0, 1).

    Returns:
        Two floats; 0 for k = 0 below, 1 for k = n above.

    Raises:
        ValueError: a count or the confidence out of range.

    Source: Clopper and Pearson, 1934.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes must lie in [0, trials] with trials at least 1; got {successes} of {trials}")
    check_confidence(confidence)
    tail, k, n = (1 - confidence) / 2, successes, trials
    low = 0.0 if k == 0 else _solve(lambda p: binomial_tail(k, n, p), tail)
    high = 1.0 if k == n else _solve(lambda p: binomial_tail(k + 1, n, p), 1 - tail)
    return low, high


def delong(scores: Array, members: Array, *, confidence: float = 0.95) -> AucInterval:
    """AUC with variance var(V10) / m + var(V01) / n, V: each member's (non-member's) share of pairs that it wins.

    Args:
        scores: [N], real, no NaN; a tie counts 1/2.
        members: [N], bool, at least two members and two non-members.
        confidence: in (0, 1).

    Returns:
        ``AucInterval``. At an AUC of 0 or 1 the standard error is 0, and the interval a point: that says nothing.

    Raises:
        TypeError, ValueError: as for `roc_curve`, or fewer than two on a side.

    Source: DeLong, DeLong and Clarke-Pearson, 1988; midranks: Sun and Xu, 2014.
    """
    values, flags = pair(scores, members, ndim=1)
    check_confidence(confidence)
    own, other = np.sort(values[flags]), np.sort(values[~flags])
    if min(len(own), len(other)) < 2:
        raise ValueError(f"members must hold two of each side; got {len(own)} members, {len(other)} non-members")
    won = _wins(values[flags], other)
    lost = 1 - _wins(values[~flags], own)
    found = area(curve_of(values, flags, rank(values, flags)))
    std = math.sqrt(won.var(ddof=1) / len(own) + lost.var(ddof=1) / len(other))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * std
    return AucInterval(found, max(0.0, found - reach), min(1.0, found + reach), std)


def _wins(values: Floats, rising: Floats) -> Floats:
    """Each value's share of pairs with the rising ones in which it is larger, ties 1/2."""
    both = np.searchsorted(rising, values, side="left") + np.searchsorted(rising, values, side="right")
    return both / (2 * len(rising))


def check_confidence(confidence: float) -> None:
    """Raises unless it lies between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")


def binomial_tail(k: int, n: int, p: float) -> float:
    """P[Bin(n, p) >= k], which is the regularized incomplete beta function I_p(k, n - k + 1)."""
    if k <= 0:
        return 1.0
    if k > n:
        return 0.0
    return incomplete_beta(float(k), float(n - k + 1), p)


def incomplete_beta(a: float, b: float, p: float) -> float:
    """I_p(a, b), the regularized incomplete beta function, a and b above 0."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(p) + b * math.log1p(-p))
    if p < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, p) / a
    return 1 - front * _fraction(b, a, 1 - p) / b


def _fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function, by Lentz's method (Numerical Recipes, section 6.4)."""
    tiny = 1e-300
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    result = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1 / _away(1 + step * d, tiny)
            c = _away(1 + step / c, tiny)
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return result


def _away(x: float, tiny: float) -> float:
    return tiny if abs(x) < tiny else x


def _solve(rising: Callable[[float], float], level: float) -> float:
    """Where a rising function on [0, 1] reaches a level, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2
