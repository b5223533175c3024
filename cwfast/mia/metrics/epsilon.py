"""Lower bounds on the epsilon of differential privacy, from how well members are told from non-members.

They hold for canaries that were put in or left out by independent coin tosses. A bound of 0 is no sign of privacy.
"""

import math
from statistics import NormalDist

import numpy as np

from cwfast.mia._inputs import Array, Floats, Ints
from cwfast.mia.metrics.intervals import binomial_tail, check_confidence, clopper_pearson
from cwfast.mia.metrics.roc import curve_of, pair, rank

_MOST = 100.0  # a larger epsilon is never reported: no count could tell


def epsilon_from_counts(
    true_positives: int,
    members: int,
    false_positives: int,
    non_members: int,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """max(ln((TPR_low - delta) / FPR_high), ln((TNR_low - delta) / FNR_high), 0), one-sided Clopper-Pearson bounds.

    Each bound has level (1 - confidence) / 2, so that both hold together. The threshold behind the counts must not
    have been chosen on the same samples: see `epsilon_lower_bound`.

    Args:
        true_positives: members called members.
        members: how many there are, at least 1.
        false_positives: non-members called members.
        non_members: how many there are, at least 1.
        delta: in [0, 1).
        confidence: in (0, 1).

    Returns:
        A float, at least 0.

    Raises:
        ValueError: an argument out of range.

    Source: Jagielski, Ullman and Oprea, "Auditing Differentially Private Machine Learning", NeurIPS 2020.
    """
    _check(delta, confidence)
    tpr_low = clopper_pearson(true_positives, members, confidence=confidence)[0]
    fpr_high = clopper_pearson(false_positives, non_members, confidence=confidence)[1]
    ratios = ((tpr_low - delta, fpr_high), (1 - fpr_high - delta, 1 - tpr_low))
    return max(0.0, *(math.log(above / below) for above, below in ratios if above > 0 and below > 0))


def epsilon_lower_bound(
    scores: Array, members: Array, *, delta: float = 0.0, confidence: float = 0.95, seed: int = 0
) -> float:
    """`epsilon_from_counts` on one random half of the samples, at the threshold that is best on the other half.

    Args:
        scores: [N], real, no NaN; each half must get a member and a non-member.
        members: [N], bool.
        delta: in [0, 1).
        confidence: in (0, 1).
        seed: of the halves.

    Returns:
        A float, at least 0.

    Raises:
        TypeError, ValueError: as for `roc_curve` in a half, or an option out of range.

    Source: Jagielski et al., NeurIPS 2020; the halves as the "split" strategy of jax_privacy.
    """
    _check(delta, confidence)
    values, flags = pair(scores, members, ndim=1)
    order = np.random.default_rng(seed).permutation(len(values))
    sides = [np.concatenate([order[flags[order]][half::2], order[~flags[order]][half::2]]) for half in (0, 1)]
    known, judged = ((values[side], flags[side]) for side in sides)
    for side in (known, judged):
        pair(*side, ndim=1)
    curve = curve_of(*known, rank(*known))
    deviations = NormalDist().inv_cdf((1 + confidence) / 2)
    tpr_low = _wilson(curve.true_positives, curve.true_positives[-1], -deviations)
    fpr_high = _wilson(curve.false_positives, curve.false_positives[-1], deviations)
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = np.fmax(np.log((tpr_low - delta) / fpr_high), np.log((1 - fpr_high - delta) / (1 - tpr_low)))
    threshold = curve.thresholds[int(np.nan_to_num(bounds, nan=-np.inf).argmax())]
    called = (judged[0] >= threshold) & (threshold < np.inf)
    true, false = (int((called & side).sum()) for side in (judged[1], ~judged[1]))
    inside = int(judged[1].sum())
    return epsilon_from_counts(true, inside, false, len(called) - inside, delta=delta, confidence=confidence)


def epsilon_from_guesses(
    correct: int, guesses: int, samples: int, *, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest epsilon that so many correct guesses about one run reject.

    With q = e^eps / (1 + e^eps) and beta(v) = P[Bin(guesses, q) >= v], a mechanism that is (epsilon, delta)-private
    makes ``correct`` right guesses with probability at most beta(correct) + 2 samples delta alpha, where
    alpha = max over i >= 1 of (beta(correct - i) - beta(correct)) / i.

    Args:
        correct: right guesses.
        guesses: all guesses; the other samples were abstained from.
        samples: canaries, each put in by an independent fair coin.
        delta: in [0, 1).
        confidence: in (0, 1).

    Returns:
        A float in [0, 100].

    Raises:
        ValueError: an argument out of range.

    Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem 5.2 and
        the code of their appendix D.
    """
    if not 0 <= correct <= guesses <= samples:
        raise ValueError(f"0 <= correct <= guesses <= samples must hold; got {correct}, {guesses}, {samples}")
    _check(delta, confidence)
    low, high = 0.0, _MOST
    if _p_value(correct, guesses, samples, low, delta) >= 1 - confidence:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        if _p_value(correct, guesses, samples, middle, delta) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def epsilon_one_run(
    scores: Array,
    members: Array,
    *,
    guess_members: int,
    guess_non_members: int,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """`epsilon_from_guesses` where the highest scores are guessed members and the lowest non-members.

    Args:
        scores: [N], real, no NaN; of equal scores the first samples are taken.
        members: [N], bool: each by an independent fair coin.
        guess_members: how many of the highest; fixed before the scores are seen.
        guess_non_members: how many of the lowest; in all at most N.
        delta: in [0, 1).
        confidence: in (0, 1).

    Returns:
        A float in [0, 100].

    Raises:
        TypeError, ValueError: as for `roc_curve`, or a number out of range.

    Source: Steinke et al., NeurIPS 2023, algorithm 1.
    """
    values, flags = pair(scores, members, ndim=1)
    guesses = guess_members + guess_non_members
    if min(guess_members, guess_non_members) < 0 or guesses > len(values):
        raise ValueError(
            "guess_members and guess_non_members must be at least 0 and together at most the number of scores, "
            f"{len(values)}; got {guess_members} and {guess_non_members}"
        )
    falling = flags[np.argsort(-values, kind="stable")]
    right = falling[:guess_members].sum() + (~falling[len(falling) - guess_non_members :]).sum()
    return epsilon_from_guesses(int(right), guesses, len(values), delta=delta, confidence=confidence)


def _wilson(count: Ints, total: int, z: float) -> Floats:
    """A bound on count / total that is quick to compute: only the choice of a threshold hangs on it."""
    p = count / total
    reach = z * np.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    bound: Floats = (p + z * z / (2 * total) + reach) / (1 + z * z / total)
    return bound


def _p_value(correct: int, guesses: int, samples: int, epsilon: float, delta: float) -> float:
    q = 1 / (1 + math.exp(-epsilon))
    p = binomial_tail(correct, guesses, q)
    if delta > 0 and correct > 0:
        k = np.arange(correct - 1, -1, -1)
        log_choose = [math.lgamma(guesses + 1) - math.lgamma(x + 1) - math.lgamma(guesses - x + 1) for x in k.tolist()]
        log_miss = -epsilon - math.log1p(math.exp(-epsilon))  # ln(1 - q), also where q rounds to 1
        mass = np.exp(np.array(log_choose) + k * math.log(q) + (guesses - k) * log_miss)
        p += 2 * samples * delta * float((np.cumsum(mass) / np.arange(1, correct + 1)).max())
    return min(p, 1.0)


def _check(delta: float, confidence: float) -> None:
    check_confidence(confidence)
    if not 0 <= delta < 1:
        raise ValueError(f"delta must lie in [0, 1); got {delta}")
