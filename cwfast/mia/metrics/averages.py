"""Means over targets, with intervals over samples and over models apart."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from cwfast.mia._inputs import Array, Floats, Ints
from cwfast.mia.metrics.roc import (
    Ranked,
    area,
    best_accuracy,
    curve_of,
    floor_of,
    pair,
    rank,
    share_of,
    tpr_at,
)

_CHUNK = 1 << 16  # weights drawn at once: 0.5 MB of int64
_BLOCK = 1 << 14  # weights counted at once: the six arrays alive together then stay in cache
_MEMBER = 1 << 32  # a true positive in sums that count false ones below it
_FEW = 10  # below so many allowed false positives one sample more or less moves the threshold a lot


def summary(
    scores: Array,
    members: Array,
    *,
    fprs: Sequence[float] = (1e-2, 1e-3),
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    draws: bool = False,
) -> dict[str, Any]:
    """Metrics per target, averaged over targets, with percentile intervals from resampled samples.

    One bootstrap replicate draws N samples (columns) with replacement, the same for all targets, so that a sample's
    targets stay together. The interval thus tells how far other samples would move the mean over THESE targets.
    How far other models would move it is told apart, by means of targets drawn with replacement (``models_low``,
    ``models_high``); targets that are each other's shadow models are not independent, so take that as a hint.
    A replicate that leaves some target without members or without non-members is skipped; ``bootstrap`` in the result
    counts those kept.

    Where few false positives are allowed, replicates often lack the highest-scoring non-member, and TPR can only rise
    by that: the interval lies too high and may even leave out the estimate. ``warning`` says so.

    Args:
        scores: [N], or [K, N] for K targets over the same N samples; real, no NaN.
        members: bool, same shape as ``scores``.
        fprs: nominal false-positive rates for TPR at FPR, each in [0, 1].
        bootstrap: replicates to draw; 0 gives intervals of None.
        confidence: of the intervals, in (0, 1).
        seed: of the draws; the same seed and shape give the same draws.
        draws: also return ``auc_draws``, the mean AUC of each replicate: those of two attacks on the same samples, by
            the same seed, come in pairs, and their differences give an interval of the difference.

    Returns:
        ``targets``, ``samples``, ``bootstrap``, ``confidence``, ``auc``, ``auc_low``, ``auc_high``,
        ``auc_std_targets`` (ddof 1; None for one target), ``auc_models_low``, ``auc_models_high`` (None for one
        target), ``balanced_accuracy`` (optimistic, see there) and ``tpr_at_fpr``: per rate a dict of ``fpr`` (nominal),
        ``tpr``, ``low``, ``high``, ``models_low``, ``models_high``, ``realised_fpr`` (mean), ``false_positives_min``,
        ``false_positives_max`` (over targets), ``warning`` (None, or why the figure is coarse). Only ints, floats,
        strings, lists, dicts and None.

    Raises:
        TypeError, ValueError: as for `roc_curve` (in any target), or an option out of range.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979 (percentile intervals).
    """
    shares = [share_of("fprs", fpr) for fpr in fprs]
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be at least 0; got {bootstrap}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    values, flags = pair(scores, members, ndim=2)
    ranks = [rank(*row) for row in zip(values, flags, strict=True)]
    curves = [curve_of(*row) for row in zip(values, flags, ranks, strict=True)]
    areas = [area(curve) for curve in curves]
    area_draws, tpr_draws = _bootstrap(ranks, shares, bootstrap, seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    auc_low, auc_high = _interval(area_draws, tails)
    models_low, models_high = _interval(_over_models(areas, bootstrap, seed), tails)
    at_fpr = []
    for fpr, share, replicates in zip(fprs, shares, tpr_draws, strict=True):
        points = [tpr_at(curve, share) for curve in curves]
        low, high = _interval(replicates, tails)
        fewest, most = _interval(_over_models([point.tpr for point in points], bootstrap, seed), tails)
        at_fpr.append(
            {
                "fpr": float(fpr),
                "tpr": float(np.mean([point.tpr for point in points])),
                "low": low,
                "high": high,
                "models_low": fewest,
                "models_high": most,
                "realised_fpr": float(np.mean([point.fpr for point in points])),
                "false_positives_min": min(point.false_positives for point in points),
                "false_positives_max": max(point.false_positives for point in points),
                "warning": _coarse(share, min(int(curve.false_positives[-1]) for curve in curves)),
            }
        )
    return {
        "targets": len(curves),
        "samples": values.shape[1],
        "bootstrap": len(area_draws),
        "confidence": float(confidence),
        "auc": float(np.mean(areas)),
        "auc_low": auc_low,
        "auc_high": auc_high,
        "auc_std_targets": float(np.std(areas, ddof=1)) if len(areas) > 1 else None,
        "auc_models_low": models_low,
        "auc_models_high": models_high,
        "balanced_accuracy": float(np.mean([best_accuracy(curve) for curve in curves])),
        "tpr_at_fpr": at_fpr,
        **({"auc_draws": area_draws.tolist()} if draws else {}),
    }


def _coarse(share: Fraction, negatives: int) -> str | None:
    if share * negatives >= _FEW:
        return None
    return (
        f"fpr {float(share):g} of {negatives} non-members allows {floor_of(share, negatives)} false positives; "
        f"below {_FEW} this TPR is coarse and its interval lies too high"
    )


def _bootstrap(ranks: list[Ranked], shares: list[Fraction], draws: int, seed: int) -> tuple[Floats, list[Floats]]:
    """Replicates kept of the mean AUC and, per share, of the mean TPR over targets."""
    rng = np.random.default_rng(seed)
    samples = ranks[0].order.size
    step = max(1, _CHUNK // samples)
    rows = max(1, _BLOCK // samples)
    units = [np.where(rank.member, _MEMBER, 1) for rank in ranks]
    allowed = _Allowed(shares)
    kept: list[Floats] = [np.empty((1 + len(shares), 0))]
    for start in range(0, draws, step):
        width = min(step, draws - start)
        # Drawing N indices and counting them is the multinomial(N; 1/N, ..., 1/N), at a fraction of its cost.
        cells = rng.integers(samples, size=(samples, width)) + np.arange(width) * samples
        weights = np.bincount(cells.ravel(), minlength=samples * width).reshape(width, samples)
        for block in np.split(weights, range(rows, width, rows)):
            mean: Floats = np.mean([_weighted(one, block, allowed) for one in zip(ranks, units, strict=True)], axis=0)
            kept.append(mean[:, ~np.isnan(mean).any(axis=0)])
    areas, *tprs = np.concatenate(kept, axis=1)
    return areas, tprs


class _Allowed(dict[int, Ints]):
    """By the number of non-members: the false positives that each share allows."""

    def __init__(self, shares: list[Fraction]) -> None:
        self.shares = shares

    def __missing__(self, negatives: int) -> Ints:
        found = np.array([floor_of(share, negatives) for share in self.shares], np.int64)
        self[negatives] = found
        return found


def _over_models(values: Sequence[float], draws: int, seed: int) -> Floats:
    """Means of as many targets, drawn with replacement; none for a single target."""
    if len(values) < 2:
        return np.empty(0)
    chosen = np.random.default_rng([seed, len(values)]).integers(len(values), size=(draws, len(values)))
    means: Floats = np.asarray(values)[chosen].mean(axis=1)
    return means


def _weighted(one: tuple[Ranked, Ints], weights: Ints, allowed: _Allowed) -> Floats:
    """[1 + shares, R]: AUC and TPR at each share under the weights [R, N]; NaN where a class has no weight.

    A running sum of ``weights * units`` counts true positives in the upper half of a 64-bit number and false ones in
    the lower, each below 2^31, as the N indices that were drawn take 8 N bytes.
    """
    rank, units = one
    steps = np.take(weights, rank.order, axis=1)  # 13 times faster than weights[:, order]
    steps *= units
    both = np.cumsum(steps, axis=1)
    ties = rank.vertices.size <= both.shape[1]
    if ties:
        both = np.take(both, rank.vertices[1:] - 1, axis=1)
        steps = np.diff(both, axis=1, prepend=0)
    hits, alarms, wrong = both >> 32, both & (_MEMBER - 1), steps & (_MEMBER - 1)
    positives, negatives = hits[:, -1], alarms[:, -1]
    twice = 2 * np.einsum("rv,rv->r", wrong, hits)
    if ties:  # a step to the right and up at once: half of its rectangle lies above the curve
        twice -= np.einsum("rv,rv->r", wrong, steps >> 32)
    # Rows of false positives, each raised above the one before, are one rising sequence: one search finds all places.
    raised = (np.arange(len(alarms)) * (weights.shape[1] + 1))[:, None]
    limits = np.array([allowed[count] for count in negatives.tolist()]) + raised
    at = np.searchsorted((alarms + raised).ravel(), limits.ravel(), side="right").reshape(limits.shape).T
    at -= np.arange(len(alarms)) * alarms.shape[1]
    reached = np.where(at > 0, hits[np.arange(len(hits)), at - 1], 0)
    rows = np.concatenate(((twice / 2)[None], reached * negatives))
    return np.divide(rows, positives * negatives, out=np.full_like(rows, np.nan), where=positives * negatives > 0)


def _interval(draws: Floats, tails: list[float]) -> tuple[float | None, float | None]:
    if draws.size == 0:
        return None, None
    low, high = np.quantile(draws, tails)
    return float(low), float(high)
