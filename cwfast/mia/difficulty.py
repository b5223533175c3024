"""A loss compared with other models' on the same sample (calibrated, Attack-R), or with other samples' (Attack-P)."""

import numpy as np

from cwfast.mia import _inputs, _shadows
from cwfast.mia._inputs import Array, Floats

_MOST = 1000.0  # nats: Attack-R's largest loss, as in the authors' code


def calibrated_loss(logprob: Array, membership: Array, target: int | None = None, *, mode: str = "offline") -> Floats:
    """score = ln p(y | x, target) - mean_k ln p(y | x, model k), averaged over queries: the loss less its usual size.

    Args:
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0, no NaN;
            -inf is a probability of 0, and a score is 0 where both terms are -inf.
        membership: [K, N], bool: model k was trained on sample i.
        target: row of the attacked model, or None for every row.
        mode: "offline": mean over OUT models; "online": over all others, less one per sample where the split is
            balanced (see `cwfast.mia.attacks`).

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError, ValueError: as for `cwfast.mia.loss`, or a sample without a model to compare with.

    Source: Watson et al., "On the Importance of Difficulty Calibration in Membership Inference Attacks", ICLR 2022.
    """
    values = _inputs.logprob(logprob)
    member = _inputs.membership(membership, values)
    _inputs.choice("mode", mode, ("online", "offline"))
    rows = _inputs.targets(target, values)
    inside, outside = _shadows.sides(member, rows)
    used = [outside] if mode == "offline" else [inside, outside]
    count = sum((side.left for side in used), np.zeros((), np.int64))
    _shadows.enough(count, "OUT" if mode == "offline" else "other", rows, 1)
    usual = np.zeros(count.shape)
    for query in values:
        impossible = query == -np.inf
        for side in used:
            mean = _shadows.moments(np.where(impossible, 0, query), side.use).mean
            never = side.use & impossible
            all_never = never.sum(axis=0)
            for row, left in enumerate(side.left):
                found = np.where(all_never > side.pick(never, row), -np.inf, side.pick(mean, row))
                usual[row] += left / count[row] * np.where(left > 0, found, 0) / len(values)
    scores = _inputs.difference(values[:, rows].mean(axis=0), usual)
    return scores if target is None else scores[0]


def attack_r(logprob: Array, membership: Array, target: int | None = None) -> Floats:
    """score = 1 - quantile level of the target's loss among the OUT models' losses on the same sample.

    The levels of the n losses between a least of 0 and a largest of 1000 are 1/(n+1) .. n/(n+1), linear in between; a
    loss equal to others has the lowest of their levels. Averaged over queries. With few models ties are many.

    Args:
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0, no NaN.
        membership: [K, N], bool: model k was trained on sample i.
        target: row of the attacked model, or None for every row.

    Returns:
        float64 in [0, 1], of shape [N], or [K, N] for ``target`` None.

    Raises:
        TypeError, ValueError: as for `cwfast.mia.loss`, or a sample without an OUT model.

    Source: Ye et al., "Enhanced Membership Inference Attacks against Machine Learning Models", CCS 2022, attack R;
        interpolation and bounds as in their code (Privacy Meter 1).
    """
    values = _inputs.logprob(logprob)
    member = _inputs.membership(membership, values)
    rows = _inputs.targets(target, values)
    outside = _shadows.sides(member, rows)[1]
    _shadows.enough(outside.left, "OUT", rows, 1)
    losses = np.clip(-values, 0, _MOST)
    scores = np.empty(outside.left.shape)
    for row, chosen in enumerate(rows):
        use = outside.use.copy()
        np.put_along_axis(use, outside.lost[row][None], False, axis=0)
        level = np.zeros(member.shape[1])
        for query in losses:
            at = query[chosen]
            less = use & (query < at)
            below = np.where(less, query, 0.0).max(axis=0)
            above = np.where(use & ~less, query, _MOST).min(axis=0)
            width = above - below
            part = np.divide(at - below, width, out=np.zeros_like(at), where=width > 0)
            level += (less.sum(axis=0) + part) / (outside.left[row] + 1) / len(losses)
        scores[row] = 1 - level
    return scores if target is None else scores[0]


def attack_p(
    logprob: Array, membership: Array, target: int | None = None, *, population: Array | None = None
) -> Floats:
    """score = 1 - share of the population on which the target's loss is at most that on x.

    A ranking of the target's own losses, so AUC and ROC are those of the loss but for ties; what it adds is a
    threshold: score > 1 - alpha has a false-positive rate of about alpha without any other model.

    Args:
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0, no NaN; averaged
            over queries.
        membership: [K, N], bool: model k was trained on sample i.
        target: row of the attacked model, or None for every row.
        population: [M] distinct sample indices, or None for all samples. A target's own members are left out of it;
            a non-member of it counts itself, or equal losses would be told apart by membership (see `cwfast.mia.rmia`).

    Returns:
        float64 in [0, 1], of shape [N], or [K, N] for ``target`` None.

    Raises:
        TypeError, ValueError: as for `cwfast.mia.rmia`.

    Source: Ye et al., CCS 2022, attack P.
    """
    values = _inputs.logprob(logprob)
    member = _inputs.membership(membership, values)
    pool = _inputs.population(population, member.shape[1])
    rows = _inputs.targets(target, values)
    losses = -values[:, rows].mean(axis=0)
    scores = np.empty_like(losses)
    for row, crowd in enumerate(_inputs.crowds(pool, member, rows)):
        at_most = np.searchsorted(np.sort(losses[row, crowd]), losses[row], side="right")
        scores[row] = 1 - at_most / np.count_nonzero(crowd)
    return scores if target is None else scores[0]
