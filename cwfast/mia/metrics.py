"""ROC = (FP / non-members, TP / members) at the end of each block of equal scores, and what follows from it.

A sample is called a member where ``score >= threshold``; larger = more likely a member. Counts stay integers until
the last division, nothing is interpolated, and ties never depend on the order of the samples.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cwfast.mia._inputs import Array, Floats, Ints, to_numpy

_CHUNK = 1 << 16  # weights drawn at once: 0.5 MB of int64; the six arrays alive together then stay in cache (1.8x)
_FEW = 10  # below so many allowed false positives one sample more or less moves the threshold a lot


class RocCurve(NamedTuple):
    """Vertices of a ROC curve, from (0, 0) to (1, 1); all arrays have shape [vertices]."""

    fpr: Floats
    tpr: Floats
    thresholds: Floats
    false_positives: Ints
    true_positives: Ints


class TprAtFpr(NamedTuple):
    """A vertex of the ROC curve: ``tpr`` at the realised ``fpr``."""

    tpr: float
    fpr: float
    threshold: float
    false_positives: int


class TnrAtFnr(NamedTuple):
    """A vertex of the ROC curve: ``tnr`` at the realised ``fnr``."""

    tnr: float
    fnr: float
    threshold: float
    false_negatives: int


class _Ranked(NamedTuple):
    order: Ints  # [N], samples by falling score
    member: npt.NDArray[np.bool_]  # [N], in that order
    vertices: Ints  # 0, then how many samples lie above the end of each tie block


def roc_curve(scores: Array, members: Array) -> RocCurve:
    """(FP, TP) = counts of ``score >= threshold`` among non-members and members, for each distinct score, falling.

    Args:
        scores: [N], any real dtype; -inf and +inf are ordinary values, each its own tie block.
        members: [N], bool, on any device.

    Returns:
        Shares (float64) and counts (int64), from (0, 0) to (1, 1). Equal scores share one vertex, at the end of their
        block. ``thresholds[0]`` is +inf and stands for "nobody is called a member", even where a score is +inf.

    Raises:
        TypeError: ``members`` is not bool, or ``scores`` not real.
        ValueError: shapes differ, a score is NaN, or there is no member or no non-member (so for empty input too).

    Source: Fawcett, "An introduction to ROC analysis", 2006, algorithm 1.
    """
    values, flags = _pair(scores, members, ndim=1)
    return _curve(values, flags, _rank(values, flags))


def auc(scores: Array, members: Array) -> float:
    """Share of (member, non-member) pairs in which the member scores higher, a tie counting 1/2.

    Args:
        scores: [N], real, no NaN.
        members: [N], bool.

    Returns:
        The exact ratio of two integers, rounded once. Far below 0.5 is a leak as well: of a score with the wrong sign.

    Raises:
        TypeError, ValueError: as for `roc_curve`.

    Source: Mann and Whitney, 1947; Hanley and McNeil, 1982.
    """
    return _area(roc_curve(scores, members))


def tpr_at_fpr(scores: Array, members: Array, fpr: float) -> TprAtFpr:
    """max TPR over ROC vertices with FP <= floor(fpr * non-members); no interpolation between vertices.

    Args:
        scores: [N], real, no NaN. A tie block that would go beyond the allowed false positives is left out whole.
        members: [N], bool.
        fpr: in [0, 1]; read as the decimal number it prints as, so 0.29 of 100 allows 29.

    Returns:
        The vertex (of several with that TPR, the one with the fewest FP): its TPR, the FPR it really has, its threshold
        (+inf: nobody is called a member), its FP count.

    Raises:
        TypeError, ValueError: as for `roc_curve`, or ``fpr`` outside [0, 1].

    Source: Carlini et al., "Membership Inference Attacks From First Principles" (S&P 2022).
    """
    share = _share("fpr", fpr)
    return _tpr_at(roc_curve(scores, members), share)


def tnr_at_fnr(scores: Array, members: Array, fnr: float) -> TnrAtFnr:
    """max TNR over ROC vertices with FN <= floor(fnr * members): `tpr_at_fpr` of ``-scores`` and ``~members``.

    Args:
        scores: [N], real, no NaN.
        members: [N], bool.
        fnr: in [0, 1]; read as the decimal number it prints as.

    Returns:
        The vertex: its TNR, the FNR it really has, its threshold, its FN count.

    Raises:
        TypeError, ValueError: as for `roc_curve`, or ``fnr`` outside [0, 1].

    Source: Chen and Pattabiraman, "Overconfidence is a Dangerous Thing" (HAMP), NDSS 2024, evaluation.
    """
    share = _share("fnr", fnr)
    curve = roc_curve(scores, members)
    positives, negatives = int(curve.true_positives[-1]), int(curve.false_positives[-1])
    at = int(np.searchsorted(curve.true_positives, positives - _floor(share, positives), side="left"))
    at = int(np.searchsorted(curve.false_positives, curve.false_positives[at], side="right")) - 1  # the fewest FN
    missed = positives - int(curve.true_positives[at])
    found = negatives - int(curve.false_positives[at])
    return TnrAtFnr(found / negatives, missed / positives, float(curve.thresholds[at]), missed)


def balanced_accuracy(scores: Array, members: Array) -> float:
    """max over thresholds of (TPR + 1 - FPR) / 2, at least 0.5.

    Optimistic: the threshold is chosen on the very samples it is judged on, which no attacker can do.

    Args:
        scores: [N], real, no NaN.
        members: [N], bool.

    Returns:
        A float in [0.5, 1].

    Raises:
        TypeError, ValueError: as for `roc_curve`.

    Source: Song and Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models", USENIX Security 2021.
    """
    return _best_accuracy(roc_curve(scores, members))


def summary(
    scores: Array,
    members: Array,
    *,
    fprs: Sequence[float] = (1e-2, 1e-3),
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics per target, averaged over targets, with percentile intervals from resampled samples.

    One bootstrap replicate draws N samples (columns) with replacement, the same for all targets, so that a sample's
    targets stay together. The interval thus tells how far other samples would move the mean over THESE targets;
    ``auc_std_targets`` tells how far the targets differ. A replicate that leaves some target without members or
    without non-members is skipped; ``bootstrap`` in the result counts those kept.

    Where few false positives are allowed, replicates often lack the highest-scoring non-member, and TPR can only rise
    by that: the interval lies too high and may even leave out the estimate. ``warning`` says so.

    Args:
        scores: [N], or [K, N] for K targets over the same N samples; real, no NaN.
        members: bool, same shape as ``scores``.
        fprs: nominal false-positive rates for TPR at FPR, each in [0, 1].
        bootstrap: replicates to draw; 0 gives intervals of None.
        confidence: of the intervals, in (0, 1).
        seed: of the draws; the same seed and shape give the same draws.

    Returns:
        ``targets``, ``samples``, ``bootstrap``, ``confidence``, ``auc``, ``auc_low``, ``auc_high``,
        ``auc_std_targets`` (ddof 1; None for one target), ``balanced_accuracy`` (optimistic, see there) and
        ``tpr_at_fpr``: per rate a dict of ``fpr`` (nominal), ``tpr``, ``low``, ``high``, ``realised_fpr`` (mean),
        ``false_positives_min``, ``false_positives_max`` (over targets), ``warning`` (None, or why the figure is
        coarse). Only ints, floats, strings, lists, dicts and None.

    Raises:
        TypeError, ValueError: as for `roc_curve` (in any target), or an option out of range.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979 (percentile intervals).
    """
    shares = [_share("fprs", fpr) for fpr in fprs]
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be at least 0; got {bootstrap}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    values, flags = _pair(scores, members, ndim=2)
    ranks = [_rank(*row) for row in zip(values, flags, strict=True)]
    curves = [_curve(*row) for row in zip(values, flags, ranks, strict=True)]
    areas = [_area(curve) for curve in curves]
    area_draws, tpr_draws = _bootstrap(ranks, shares, bootstrap, seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    auc_low, auc_high = _interval(area_draws, tails)
    at_fpr = []
    for fpr, share, draws in zip(fprs, shares, tpr_draws, strict=True):
        points = [_tpr_at(curve, share) for curve in curves]
        low, high = _interval(draws, tails)
        at_fpr.append(
            {
                "fpr": float(fpr),
                "tpr": float(np.mean([point.tpr for point in points])),
                "low": low,
                "high": high,
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
        "balanced_accuracy": float(np.mean([_best_accuracy(curve) for curve in curves])),
        "tpr_at_fpr": at_fpr,
    }


def _pair(scores: Array, members: Array, ndim: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    values, flags = to_numpy("scores", scores, "fiub"), to_numpy("members", members, "b")
    if flags.shape != values.shape:
        raise ValueError(f"members must have the shape of scores, {values.shape}; got {flags.shape}")
    if not 1 <= values.ndim <= ndim:
        raise ValueError(f"scores must have shape {'[N]' if ndim == 1 else '[N] or [K, N]'}; got {values.shape}")
    missing = int(np.count_nonzero(np.isnan(values)))
    if missing:
        raise ValueError(f"scores must hold no NaN; got {missing} of {values.size}")
    found, total = np.atleast_1d(np.count_nonzero(flags, axis=-1)), flags.shape[-1]
    wrong = np.flatnonzero((found == 0) | (found == total))
    if found.size == 0 or wrong.size:
        given = f"{found[wrong[0]]} members of {total} samples in target {wrong[0]}" if wrong.size else "no target"
        raise ValueError(f"members must hold at least one member and one non-member per target; got {given}")
    return (values, flags) if ndim == 1 else (np.atleast_2d(values), np.atleast_2d(flags))


def _rank(scores: Floats, members: npt.NDArray[np.bool_]) -> _Ranked:
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    last = np.flatnonzero(falling[1:] != falling[:-1])  # != and not a difference: inf - inf is NaN
    return _Ranked(order, members[order], np.concatenate(([0], last + 1, [scores.size])))


def _curve(scores: Floats, members: npt.NDArray[np.bool_], rank: _Ranked) -> RocCurve:
    above = np.concatenate(([0], np.cumsum(rank.member, dtype=np.int64)))
    hits = above[rank.vertices]
    alarms = rank.vertices - hits
    thresholds = np.concatenate(([np.inf], scores[rank.order[rank.vertices[1:] - 1]]))
    return RocCurve(alarms / alarms[-1], hits / hits[-1], thresholds, alarms, hits)


def _area(curve: RocCurve) -> float:
    hits, alarms = curve.true_positives, curve.false_positives
    twice = int(np.sum(np.diff(alarms) * (hits[1:] + hits[:-1])))
    return twice / (2 * int(hits[-1]) * int(alarms[-1]))


def _tpr_at(curve: RocCurve, share: Fraction) -> TprAtFpr:
    allowed = _floor(share, int(curve.false_positives[-1]))
    at = int(np.searchsorted(curve.false_positives, allowed, side="right")) - 1
    at = int(np.searchsorted(curve.true_positives, curve.true_positives[at], side="left"))  # as many TP, fewest FP
    alarms = int(curve.false_positives[at])
    return TprAtFpr(float(curve.tpr[at]), float(curve.fpr[at]), float(curve.thresholds[at]), alarms)


def _best_accuracy(curve: RocCurve) -> float:
    positives, negatives = int(curve.true_positives[-1]), int(curve.false_positives[-1])
    best = int(np.max(curve.true_positives * negatives - curve.false_positives * positives))
    return 0.5 + best / (2 * positives * negatives)


def _share(name: str, value: float) -> Fraction:
    """The decimal number that ``value`` prints as: the float 0.29 lies below 29/100, and 0.29 * 100 must be 29."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value}")
    return Fraction(str(value))


def _floor(share: Fraction, count: int) -> int:
    return share.numerator * count // share.denominator


def _coarse(share: Fraction, negatives: int) -> str | None:
    if share * negatives >= _FEW:
        return None
    return (
        f"fpr {float(share):g} of {negatives} non-members allows {_floor(share, negatives)} false positives; "
        f"below {_FEW} this TPR is coarse and its interval lies too high"
    )


def _bootstrap(ranks: list[_Ranked], shares: list[Fraction], draws: int, seed: int) -> tuple[Floats, list[Floats]]:
    """Replicates kept of the mean AUC and, per share, of the mean TPR over targets."""
    rng = np.random.default_rng(seed)
    samples = ranks[0].order.size
    step = max(1, _CHUNK // samples)
    kept: list[Floats] = [np.empty((1 + len(shares), 0))]
    for start in range(0, draws, step):
        width = min(step, draws - start)
        # Drawing N indices and counting them is the multinomial(N; 1/N, ..., 1/N), at a fraction of its cost.
        cells = rng.integers(samples, size=(samples, width)) * width + np.arange(width)
        weights = np.bincount(cells.ravel(), minlength=samples * width).reshape(samples, width)
        mean: Floats = np.mean([_weighted(rank, weights, shares) for rank in ranks], axis=0)
        kept.append(mean[:, ~np.isnan(mean).any(axis=0)])
    areas, *tprs = np.concatenate(kept, axis=1)
    return areas, tprs


def _weighted(rank: _Ranked, weights: Ints, shares: list[Fraction]) -> Floats:
    """[1 + shares, R]: AUC and TPR at each share under the weights [N, R]; NaN where a class has no weight."""
    drawn = weights[rank.order]
    hits = np.zeros((drawn.shape[0] + 1, drawn.shape[1]), np.int64)  # the row of zeros is the vertex (0, 0)
    alarms = np.zeros_like(hits)
    np.cumsum(drawn * rank.member[:, None], axis=0, out=hits[1:])
    np.cumsum(drawn, axis=0, out=alarms[1:])
    alarms -= hits
    if rank.vertices.size < hits.shape[0]:
        hits, alarms = hits[rank.vertices], alarms[rank.vertices]
    positives, negatives = hits[-1], alarms[-1]
    twice = np.einsum("vr,vr->r", np.diff(alarms, axis=0), hits[1:] + hits[:-1])
    rows = [twice / 2]
    for share in shares:
        allowed = np.array([_floor(share, int(count)) for count in negatives])
        at = np.count_nonzero(alarms <= allowed, axis=0) - 1
        rows.append(np.take_along_axis(hits, at[None], axis=0)[0] * negatives)
    result = np.full((len(rows), weights.shape[1]), np.nan)
    return np.divide(rows, positives * negatives, out=result, where=positives * negatives > 0)


def _interval(draws: Floats, tails: list[float]) -> tuple[float | None, float | None]:
    if draws.size == 0:
        return None, None
    low, high = np.quantile(draws, tails)
    return float(low), float(high)
