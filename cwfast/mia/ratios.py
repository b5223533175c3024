"""RMIA and BASE: how much likelier is a sample under the target than under a typical model, as given by the others?"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cwfast.mia import _inputs, _shadows
from cwfast.mia._inputs import Array, Bools, Floats

_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def rmia(
    logprob: Array,
    membership: Array,
    target: int | None = None,
    *,
    population: Array | None = None,
    mode: str = "online",
    gamma: float = 2.0,
    a: float = 0.3,
    vote: str = "mean",
) -> Floats:
    """score(x) = share of z in the population with r(x) / r(z) > gamma, where r(x) = p(x | target) / p(x).

    Computed as the rank of ln r(x) - ln gamma among the sorted ln r(z), counting ln r(z) strictly below it: the
    pairwise definition without its matrix.

    Args:
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0, no NaN. -inf is
            a probability of 0; where p(x | target) and p(x) are both 0, and where queries say 0 and infinity, r is 1.
        membership: [K, N], bool: model k was trained on sample i.
        target: row of the attacked model, or None for every row.
        population: [M] distinct sample indices, or None for all samples. A target's own members are left out of it.
            A non-member of it is compared with itself too, which adds nothing for gamma >= 1: leaving it out would
            change the divisor for non-members alone, so that samples with equal ratios, of which there are many where
            a model is sure of most, would be told apart by their membership.
        mode: "online": p(x) = mean of the other models' probabilities, less one model per sample where the split is
            balanced (see `cwfast.mia.attacks`). "offline": p(x) = ((1 + a) p_OUT(x) + 1 - a) / 2, p_OUT over OUT
            models only.
        gamma: above 0.
        a: in [0, 1]; 1 takes p(x) = p_OUT(x). Only "offline" uses it.
        vote: with several queries, "mean": ln r is averaged over them; "majority": z counts where more than half of
            the queries say so, as in the authors' code (a tie says no). That takes every pair, 64 of them a step.

    Returns:
        float64 in [0, 1], of shape [N], or [K, N] for ``target`` None. Ties are many at 0 and 1, by definition:
        `base` is the same ranking without them.

    Raises:
        TypeError: a wrong dtype, or ``target`` not an integer.
        ValueError: a wrong shape or option, a value NaN or above 0, ``target`` or an index out of range, fewer
            than 2 non-members of a target in the population, or a sample without a model to estimate p(x) from.

    The authors take p from the SM-Taylor softmax for images (``taylor_logprob``), from a softmax at temperature 2 else.

    Source: Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024;
        "more than" gamma, and not "at least", as in the authors' code.
    """
    values = _inputs.logprob(logprob)
    member = _inputs.membership(membership, values)
    _inputs.choice("mode", mode, ("online", "offline"))
    _inputs.choice("vote", vote, ("mean", "majority"))
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be above 0 and finite; got {gamma}")
    if not 0 <= a <= 1:
        raise ValueError(f"a must lie in [0, 1]; got {a}")
    pool = _inputs.population(population, member.shape[1])
    rows = _inputs.targets(target, values)
    crowds = _inputs.crowds(pool, member, rows)
    ratios = np.empty((len(values), len(rows), member.shape[1]))
    for ratio, query, typical in zip(ratios, values, _typical(values, member, rows, mode), strict=True):
        if mode == "offline":
            with np.errstate(divide="ignore"):  # ln(1 - a) = -inf at a = 1 is what is meant
                typical = np.logaddexp(np.log1p(a) + typical, np.log1p(-a)) - math.log(2)
        ratio[:] = _inputs.difference(query[rows], typical)
    if vote == "mean":
        with np.errstate(invalid="ignore"):
            ratios = _inputs.settled(ratios.mean(axis=0, keepdims=True))
    scores = np.empty(ratios.shape[1:])
    for row, crowd in enumerate(crowds):
        ratio = ratios[:, row]
        limit = ratio - math.log(gamma)
        if len(ratio) == 1:
            order = ratio[0].argsort()  # sorted limits find their places twice as fast
            below = np.empty(len(order), np.int64)
            below[order] = np.searchsorted(ratio[0, order[crowd[order]]], limit[0, order], side="left")
        else:
            below = _majority(limit, ratio[:, crowd])
        scores[row] = below / np.count_nonzero(crowd)
    return scores if target is None else scores[0]


def base(
    logprob: Array, membership: Array, target: int | None = None, *, mode: str = "online", kappa: float = 0.33
) -> Floats:
    """online: ln p(x | target) - ln mean_k p(x | model k); offline: ln p(x | target) - kappa ln mean_OUT p(x | k).

    The ratio that RMIA ranks, itself: no population, no gamma, no ties where many scores saturate. Averaged over
    queries. The authors take probabilities at temperature 2: divide the logits by it first.

    Args:
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0, no NaN; -inf as
            for `rmia`.
        membership: [K, N], bool.
        target: row of the attacked model, or None for every row.
        mode: "online" (the other models, less one per sample where the split is balanced) or "offline" (OUT only).
        kappa: in [0, 1]; how far p_OUT stands for p. Only "offline" uses it.

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError, ValueError: as for `rmia`.

    Source: Lassila, Östman and Ngo, arXiv 2505.24089.
    """
    values = _inputs.logprob(logprob)
    member = _inputs.membership(membership, values)
    _inputs.choice("mode", mode, ("online", "offline"))
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa must lie in [0, 1]; got {kappa}")
    rows = _inputs.targets(target, values)
    factor = 1.0 if mode == "online" else kappa
    scores = np.zeros((len(rows), member.shape[1]))
    with np.errstate(invalid="ignore"):
        for query, typical in zip(values, _typical(values, member, rows, mode), strict=True):
            scores += _inputs.difference(query[rows], factor * typical if factor else np.zeros(1)) / len(values)
    scores = _inputs.settled(scores)
    return scores if target is None else scores[0]


def _typical(values: Floats, member: Bools, rows: list[int], mode: str) -> Iterator[Floats]:
    """Per query: ln of the mean probability under the other models (or the OUT models), [targets, N]; -inf for 0."""
    inside, outside = _shadows.sides(member, rows)
    used = [outside] if mode == "offline" else [inside, outside]
    count = sum((side.left for side in used), np.zeros((), np.int64))
    _shadows.enough(count, "OUT" if mode == "offline" else "other", rows, 1)
    for query in values:
        if len(rows) == 1:  # one sum, instead of one without each of the models
            yield _log_sums(*_one_sum(query, used))[None] - np.log(count)
            continue
        sums = [_shadows.sums_of_exp(query, side.use) for side in used]
        typical = np.empty(count.shape)
        for row in range(len(rows)):
            picked = [(side.pick(top, row), side.pick(sum_, row)) for side, (top, sum_) in zip(used, sums, strict=True)]
            highest = _finite(np.max([top for top, _ in picked], axis=0))
            total = np.sum([sum_ * np.exp(top - highest) for top, sum_ in picked], axis=0)
            typical[row] = _log_sums(highest, total) - np.log(count[row])
        yield typical


def _one_sum(query: Floats, used: list[_shadows.Side]) -> tuple[Floats, Floats]:
    """(top, sum of e^(x - top)) of what the sides use against the only target, [N]."""
    masked = query.copy() if len(used) == 2 else np.where(used[0].use, query, -np.inf)  # two sides are all models
    for side in used:
        np.put_along_axis(masked, side.lost, -np.inf, axis=0)
    highest = _finite(masked.max(axis=0))
    masked -= highest  # in place: fresh pages cost more than the arithmetic
    return highest, np.exp(masked, out=masked).sum(axis=0)


def _log_sums(highest: Floats, total: Floats) -> Floats:
    with np.errstate(divide="ignore"):  # ln 0 where all probabilities are 0
        result: Floats = highest + np.log(total)
    return result


def _finite(x: Floats) -> Floats:
    """Any number in place of -inf: the sum that it scales is 0."""
    return np.where(x > -np.inf, x, 0)


def _majority(limit: Floats, ratio: Floats) -> npt.NDArray[np.int64]:
    """[N]: for how many of the columns of ratio [Q, Z] limit [Q, N] is larger in more than half of the queries.

    64 columns are the bits of a word. In one query, those below a limit are the first few of the 64 in rising order:
    one of 65 words, and limits in rising order take them in turn. The words of all queries are added up bit by bit
    (carry-save), and the sums compared with Q / 2.
    """
    queries, samples = limit.shape
    levels = queries.bit_length()
    found = np.zeros(samples, np.int64)
    rising = limit.argsort(axis=1)
    place = rising.argsort(axis=1)
    limit = np.take_along_axis(limit, rising, axis=1)
    for begin in range(0, ratio.shape[1], 64):
        block = ratio[:, begin : begin + 64]
        planes = np.zeros((levels, samples), np.uint64)
        for above, column, at in zip(limit, block, place, strict=True):
            order = column.argsort()
            first = np.concatenate((np.zeros(1, np.uint64), np.cumsum(np.uint64(1) << order.astype(np.uint64))))
            starts = np.searchsorted(above, column[order], side="right")  # where limits are larger than the column
            word = np.repeat(first, np.diff(starts, prepend=0, append=samples))[at]
            for plane in planes:
                word, plane[:] = plane & word, plane ^ word
        more, equal = np.zeros(samples, np.uint64), np.full(samples, ~np.uint64(0))
        for level in range(levels - 1, -1, -1):
            if (queries // 2) >> level & 1:
                equal &= planes[level]
            else:
                more |= equal & planes[level]
                equal &= ~planes[level]
        found += _BITS[more.view(np.uint8)].reshape(samples, 8).sum(axis=1, dtype=np.int64)
    return found
