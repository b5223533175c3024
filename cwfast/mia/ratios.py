"""RMIA and BASE: how much likelier is a sample under the target than under a typical model, as given by the others?"""

import math

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
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0, finite.
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
        ValueError: a wrong shape or option, a value not finite or above 0, ``target`` or an index out of range, fewer
            than 2 non-members of a target in the population, or a sample without a model to estimate p(x) from.

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
        ratio[:] = query[rows] - typical
    if vote == "mean":
        ratios = ratios.mean(axis=0, keepdims=True)
    scores = np.empty(ratios.shape[1:])
    for row, crowd in enumerate(crowds):
        ratio = ratios[:, row]
        limit = ratio - math.log(gamma)
        if len(ratio) == 1:
            below = np.searchsorted(np.sort(ratio[0, crowd]), limit[0], side="left")
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
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0, finite.
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
    found = zip(values, _typical(values, member, rows, mode), strict=True)
    scores: Floats = sum((query[rows] - factor * typical for query, typical in found), np.zeros(())) / len(values)
    return scores if target is None else scores[0]


def _typical(values: Floats, member: Bools, rows: list[int], mode: str) -> list[Floats]:
    """Per query: ln of the mean probability under the other models (or the OUT models), [targets, N]."""
    inside, outside = _shadows.sides(member, rows)
    used = [outside] if mode == "offline" else [inside, outside]
    count = sum((side.left for side in used), np.zeros((), np.int64))
    _shadows.enough(count, "OUT" if mode == "offline" else "other", rows, 1)
    result = []
    for query in values:
        sums = [_shadows.sums_of_exp(query, side.use) for side in used]
        typical = np.empty(count.shape)
        for row in range(len(rows)):
            picked = [(side.pick(top, row), side.pick(sum_, row)) for side, (top, sum_) in zip(used, sums, strict=True)]
            highest = np.max([top for top, _ in picked], axis=0)
            total = np.sum([sum_ * np.exp(top - highest) for top, sum_ in picked], axis=0)
            typical[row] = highest + np.log(total / count[row])
        result.append(typical)
    return result


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
