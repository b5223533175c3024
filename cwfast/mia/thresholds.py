"""A threshold on one number of the target: loss, correctness, gradient norm; per class (Song & Mittal)."""

import numpy as np

from cwfast.mia import _inputs
from cwfast.mia._inputs import Array, Bools, Floats, Ints


def loss(logprob: Array, membership: Array | None = None, target: int | None = None) -> Floats:
    """score = log p(y | x, target), averaged over queries: the negative loss.

    Args:
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0, no
            NaN; -inf is a probability of 0.
        membership: [K, N], bool; not used, taken so that all attacks are called alike.
        target: row of the attacked model, or None for every row.

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError: a wrong dtype, or ``target`` not an integer.
        ValueError: a wrong shape, a value NaN or above 0, or ``target`` out of range.

    Source: Yeom et al., "Privacy Risk in Machine Learning", CSF 2018, adversary 2.
    """
    return _own(_inputs.logprob(logprob), membership, target)


def correctness(correct: Array, membership: Array | None = None, target: int | None = None) -> Floats:
    """score = share of the queries that the target classifies as labelled: 0 or 1 for one query.

    Args:
        correct: [K, N] or [K, N, Q], bool.
        membership: [K, N], bool; not used.
        target: row of the attacked model, or None for every row.

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError, ValueError: as for `loss`.

    Source: Yeom et al., CSF 2018, adversary 1 (the "gap attack"); Song and Mittal, section 4.1.
    """
    flags = _inputs.to_numpy("correct", correct, "b")
    return _own(_inputs.signal("correct", flags.astype(np.float64)), membership, target)


def gradient_norm(norms: Array, membership: Array | None = None, target: int | None = None) -> Floats:
    """score = -norm of the loss gradient at x, in parameters or inputs, averaged over queries.

    Args:
        norms: [K, N] or [K, N, Q], floating point, at least 0, no NaN; infinite ones are ordinary. Norms in the
            parameters come from ``SaliencyScorer(..., norms=True)`` or ``cwfast.layers``.
        membership: [K, N], bool; not used.
        target: row of the attacked model, or None for every row.

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError, ValueError: as for `loss`, or a norm below 0.

    Source: Nasr, Shokri and Houmansadr, "Comprehensive Privacy Analysis of Deep Learning", S&P 2019, section IV.
    """
    values = _inputs.signal("norms", norms)
    if values.min() < 0:
        raise ValueError(f"norms must be at least 0; got a minimum of {values.min():g}")
    return _own(-values, membership, target)


def class_thresholds(
    values: Array, membership: Array, labels: Array, target: int | None = None, *, larger: bool = True
) -> Floats:
    """score = v - threshold of x's class (or threshold - v): at least 0 where the attack says "member".

    The threshold of a class is the v of the other models, members and non-members of that class together, for which
    (share of their members with v >= threshold + share of their non-members with v < threshold) / 2 is largest; of
    several, the one that calls the fewest members. For ``larger=False`` all signs turn.

    Args:
        values: [K, N] or [K, N, Q] (averaged over queries), floating point, no NaN: confidence, log-probability
            (``larger=True``), entropy or modified entropy (``larger=False``) of ``cwfast.ops.logit_stats``. At an
            infinite threshold, scores are infinite or 0.
        membership: [K, N], bool: model k was trained on sample i.
        labels: [N], integer classes.
        target: row of the attacked model, or None for every row.
        larger: whether members have the larger values.

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError: a wrong dtype, or ``target`` not an integer.
        ValueError: a wrong shape, a value NaN, queries of both infinities, or a class of which the other models have no
            member, or no non-member.

    Source: Song and Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models", USENIX Security 2021,
        section 4.
    """
    signals = _inputs.signal("values", values)
    member = _inputs.membership(membership, signals)
    classes = _inputs.to_numpy("labels", labels, "iu")
    if classes.shape != member.shape[1:]:
        raise ValueError(f"labels must have shape [N] = {member.shape[1:]}; got {classes.shape}")
    rows = _inputs.targets(target, signals)
    with np.errstate(invalid="ignore"):
        v = signals.mean(axis=0) if larger else -signals.mean(axis=0)
    if np.isnan(v).any():
        raise ValueError("values must have a mean over queries; got +inf and -inf of one sample")
    scores = np.empty((len(rows), member.shape[1]))
    for one in np.unique(classes):
        columns = np.flatnonzero(classes == one)
        own, flags = v[:, columns].ravel(), member[:, columns].ravel()
        order = np.argsort(-own, kind="stable")
        falling, in_order, model = own[order], flags[order], order // len(columns)
        for row, chosen in zip(scores, rows, strict=True):
            threshold = np.array(_threshold(falling, in_order, model != chosen, int(one), chosen))
            row[columns] = _inputs.difference(v[chosen, columns], threshold)
    return scores if target is None else scores[0]


def _threshold(falling: Floats, member: Bools, use: Bools, one: int, target: int) -> float:
    """The best threshold of the used values."""
    values = falling[use]
    hits = np.cumsum(member[use], dtype=np.int64)
    alarms = np.arange(1, len(values) + 1) - hits
    if len(values) == 0 or hits[-1] == 0 or alarms[-1] == 0:
        found = (int(hits[-1]), int(alarms[-1])) if len(values) else (0, 0)
        raise ValueError(
            f"the models besides target {target} must have a member and a non-member of class {one}; "
            f"got {found[0]} and {found[1]}"
        )
    ends: Ints = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    gain = hits[ends] * alarms[-1] - alarms[ends] * hits[-1]  # (TPR - FPR) x both counts: integers compare exactly
    return float(values[ends[gain.argmax()]])


def _own(values: Floats, membership: Array | None, target: int | None) -> Floats:
    if membership is not None:
        _inputs.membership(membership, values)
    scores: Floats = values[:, _inputs.targets(target, values)].mean(axis=0)
    return scores if target is None else scores[0]
