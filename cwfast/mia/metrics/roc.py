"""ROC = (FP / non-members, TP / members) at the end of each block of equal scores, and what follows from it.

A sample is called a member where ``score >= threshold``; larger = more likely a member. Counts stay integers until
the last division, nothing is interpolated, and ties never depend on the order of the samples.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from cwfast.mia._inputs import Array, Bools, Floats, Ints, to_numpy


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


class Ranked(NamedTuple):
    order: Ints  # [N], samples by falling score
    member: Bools  # [N], in that order
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
    values, flags = pair(scores, members, ndim=1)
    return curve_of(values, flags, rank(values, flags))


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
    return area(roc_curve(scores, members))


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
    share = share_of("fpr", fpr)
    return tpr_at(roc_curve(scores, members), share)


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
    share = share_of("fnr", fnr)
    curve = roc_curve(scores, members)
    positives, negatives = int(curve.true_positives[-1]), int(curve.false_positives[-1])
    at = int(np.searchsorted(curve.true_positives, positives - floor_of(share, positives), side="left"))
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
    return best_accuracy(roc_curve(scores, members))


def pair(scores: Array, members: Array, ndim: int) -> tuple[Floats, Bools]:
    """Scores and members, checked."""
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


def rank(scores: Floats, members: Bools) -> Ranked:
    """Samples by falling score, and where equal scores end."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    last = np.flatnonzero(falling[1:] != falling[:-1])  # != and not a difference: inf - inf is NaN
    return Ranked(order, members[order], np.concatenate(([0], last + 1, [scores.size])))


def curve_of(scores: Floats, members: Bools, rank: Ranked) -> RocCurve:
    """The ROC curve of ranked samples."""
    above = np.concatenate(([0], np.cumsum(rank.member, dtype=np.int64)))
    hits = above[rank.vertices]
    alarms = rank.vertices - hits
    thresholds = np.concatenate(([np.inf], scores[rank.order[rank.vertices[1:] - 1]]))
    return RocCurve(alarms / alarms[-1], hits / hits[-1], thresholds, alarms, hits)


def area(curve: RocCurve) -> float:
    """The AUC: one division of two integers."""
    hits, alarms = curve.true_positives, curve.false_positives
    twice = int(np.sum(np.diff(alarms) * (hits[1:] + hits[:-1])))
    return twice / (2 * int(hits[-1]) * int(alarms[-1]))


def tpr_at(curve: RocCurve, share: Fraction) -> TprAtFpr:
    """The vertex of `tpr_at_fpr`."""
    allowed = floor_of(share, int(curve.false_positives[-1]))
    at = int(np.searchsorted(curve.false_positives, allowed, side="right")) - 1
    at = int(np.searchsorted(curve.true_positives, curve.true_positives[at], side="left"))  # as many TP, fewest FP
    alarms = int(curve.false_positives[at])
    return TprAtFpr(float(curve.tpr[at]), float(curve.fpr[at]), float(curve.thresholds[at]), alarms)


def best_accuracy(curve: RocCurve) -> float:
    """The largest balanced accuracy of any vertex."""
    positives, negatives = int(curve.true_positives[-1]), int(curve.false_positives[-1])
    best = int(np.max(curve.true_positives * negatives - curve.false_positives * positives))
    return 0.5 + best / (2 * positives * negatives)


def share_of(name: str, value: float) -> Fraction:
    """The decimal number that ``value`` prints as: the float 0.29 lies below 29/100, and 0.29 * 100 must be 29."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value}")
    return Fraction(str(value))


def floor_of(share: Fraction, count: int) -> int:
    """How many of ``count`` are at most this share."""
    return share.numerator * count // share.denominator
