"""What an attacker could do: thresholds from other models' scores, the worth of a "member", and who is found."""

from typing import NamedTuple

import numpy as np

from cwfast.mia._inputs import Array, Floats, Ints, to_numpy
from cwfast.mia.metrics.roc import curve_of, floor_of, pair, rank, share_of, tpr_at


class AtThreshold(NamedTuple):
    """Per target, [K] each: what a threshold from the other targets does to this one."""

    threshold: Floats
    tpr: Floats
    fpr: Floats
    true_positives: Ints
    false_positives: Ints

    @property
    def balanced_accuracy(self) -> Floats:
        """(TPR + 1 - FPR) / 2, [K]."""
        return (self.tpr + 1 - self.fpr) / 2


def shadow_calibrated(scores: Array, members: Array, fpr: float | None = None) -> AtThreshold:
    """TPR and FPR of each target at the threshold that is right for the other targets' scores together.

    Unlike a threshold chosen on the target itself, one that an attacker with shadow models can have: the realised FPR
    shows how well it carries over.

    Args:
        scores: [K, N], K at least 2, real, no NaN.
        members: [K, N], bool.
        fpr: in [0, 1]: the threshold of `tpr_at_fpr` on the pooled scores of the others; None: that of their largest
            balanced accuracy (of several, the largest).

    Returns:
        ``AtThreshold``; a threshold of +inf calls nobody a member.

    Raises:
        TypeError, ValueError: as for `roc_curve` (in any target), one target only, or ``fpr`` out of range.

    Source: "shadow-only thresholds" as in the evaluation of najeebjebreel/lira_analysis.
    """
    share = None if fpr is None else share_of("fpr", fpr)
    values, flags = pair(scores, members, ndim=2)
    if len(values) < 2:
        raise ValueError("scores must have shape [K, N] with at least 2 targets; got one target")
    order = np.argsort(-values.ravel(), kind="stable")
    falling, member, model = values.ravel()[order], flags.ravel()[order], order // values.shape[1]
    thresholds = np.empty(len(values))
    for target in range(len(values)):
        use = model != target
        known, hit = falling[use], member[use]
        ends = np.append(np.flatnonzero(known[1:] != known[:-1]), len(known) - 1)
        hits = np.append(0, np.cumsum(hit, dtype=np.int64)[ends])
        alarms = np.append(0, ends + 1) - hits
        if share is None:
            at = int((hits * alarms[-1] - alarms * hits[-1]).argmax())
        else:
            at = int(np.searchsorted(alarms, floor_of(share, int(alarms[-1])), side="right")) - 1
            at = int(np.searchsorted(hits, hits[at], side="left"))
        thresholds[target] = known[ends[at - 1]] if at else np.inf
    # +inf stands for "nobody", even where a score is +inf: a threshold that is a score has called somebody
    called = (values >= thresholds[:, None]) & (thresholds < np.inf)[:, None]
    found, wrong = (called & flags).sum(axis=1), (called & ~flags).sum(axis=1)
    return AtThreshold(thresholds, found / flags.sum(axis=1), wrong / (~flags).sum(axis=1), found, wrong)


def ppv(tpr: float, fpr: float, prior: float) -> float:
    """PPV = prior TPR / (prior TPR + (1 - prior) FPR): how often "member" is right if a share ``prior`` are members.

    Args:
        tpr: in [0, 1].
        fpr: in [0, 1]; of a threshold that was not chosen on the same samples, or PPV flatters the attack.
        prior: in [0, 1].

    Returns:
        A float in [0, 1]; NaN where nobody is ever called a member.

    Raises:
        ValueError: an argument outside [0, 1].

    Source: Jayaraman et al., "Revisiting Membership Inference Under Realistic Assumptions", PoPETs 2021.
    """
    for name, value in (("tpr", tpr), ("fpr", fpr), ("prior", prior)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1]; got {value}")
    called = prior * tpr + (1 - prior) * fpr
    return prior * tpr / called if called > 0 else float("nan")


def vulnerability(scores: Array, members: Array, fpr: float, *, thresholds: Array | None = None) -> Floats:
    """[N]: in which share of the models trained on a sample it is found, at a threshold per model.

    Args:
        scores: [K, N] (or [N]), real, no NaN.
        members: same shape, bool.
        fpr: in [0, 1]: thresholds by `tpr_at_fpr` on each target itself.
        thresholds: [K] instead, such as ``shadow_calibrated(...).threshold``.

    Returns:
        float64 in [0, 1]; NaN for a sample that no model was trained on.

    Raises:
        TypeError, ValueError: as for `roc_curve`, or a wrong shape of ``thresholds``.
    """
    share = share_of("fpr", fpr)
    values, flags = pair(scores, members, ndim=2)
    if thresholds is None:
        curves = (curve_of(*row, rank(*row)) for row in zip(values, flags, strict=True))
        limits = np.array([tpr_at(curve, share).threshold for curve in curves])
    else:
        limits = to_numpy("thresholds", thresholds, "f")
        if limits.shape != values.shape[:1]:
            raise ValueError(f"thresholds must have shape [K] = ({len(values)},); got {limits.shape}")
    found = ((values >= limits[:, None]) & (limits < np.inf)[:, None] & flags).sum(axis=0)
    trained = flags.sum(axis=0)
    return np.divide(found, trained, out=np.full(len(trained), np.nan), where=trained > 0)
