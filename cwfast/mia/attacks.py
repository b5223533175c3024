"""Scores that tell members of a model's training set from non-members; larger = more likely a member, everywhere.

The target is one row of the signals, the other rows are its shadow models: every model can be attacked in turn.

A split that puts each sample in the same number c of all K models betrays the target: its members have c - 1 IN models
among the others, its non-members c. Estimates from fewer models are worse, so scores would differ even where the
signal says nothing (with 8 models and pure noise, AUC 0.44 instead of 0.50). So where a target's members have, on
average, over half an IN model less among the others than its non-members, one more model is left out per sample: the
next one after the target, cyclically, of the other side. Both then have c - 1 IN and K - c - 1 OUT models. Where coin
tosses made the split, or the target was drawn apart from its shadow models, nothing is left out. Samples in no model
or in all of them are no part of this and keep all others.
"""

import math
import operator

import numpy as np
import numpy.typing as npt
import torch

from cwfast.mia.metrics import Array, Floats, Ints, to_numpy

Bools = npt.NDArray[np.bool_]

_FLOOR = 1e-30  # keeps a standard deviation of 0 (all models agree) from dividing by 0
_PRIOR_WEIGHT = 0.1  # of the prior mean, in models: enough to bound a mean of one model, lost among several
_LEAST_SPREAD = 1e-3  # of the variances between samples, relative to their mean squared: bounds alpha at 1002


def loss(logprob: Array, membership: Array | None = None, target: int | None = None) -> Floats:
    """score = log p(y | x, target), averaged over queries: the negative loss.

    Args:
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0.
        membership: [K, N], bool; not used, taken so that all attacks are called alike.
        target: row of the attacked model, or None for every row.

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError: a wrong dtype, or ``target`` not an integer.
        ValueError: a wrong shape, a value not finite or above 0, or ``target`` out of range.

    Source: Yeom et al., "Privacy Risk in Machine Learning", CSF 2018, adversary 2.
    """
    values = _logprob(logprob)
    if membership is not None:
        _membership(membership, values)
    scores = values[:, _targets(target, values)].mean(axis=0)
    return scores if target is None else scores[0]


def lira(
    phi: Array,
    membership: Array,
    target: int | None = None,
    *,
    mode: str = "online",
    variance: str = "shrinkage",
    center: str = "median",
) -> Floats:
    """online: log f_IN(phi) - log f_OUT(phi); offline: (phi - location_OUT) / scale_OUT. Averaged over queries.

    Per sample and query, f_IN and f_OUT are fitted to phi of the other models that were, or were not, trained on it:

    - ``shrinkage``: Student-t predictive of a normal-inverse-gamma posterior. With n models, mean m and sum of squares
      S about it: k_n = k_0 + n, location (k_0 m_0 + n m) / k_n, alpha_n = alpha_0 + n/2,
      beta_n = beta_0 + S/2 + k_0 n (m - m_0)^2 / (2 k_n), scale^2 = beta_n (k_n + 1) / (alpha_n k_n), 2 alpha_n degrees
      of freedom. The prior is learned from all samples: m_0 the mean of the m, k_0 = 0.1, alpha_0 and beta_0 by
      matching mean and spread of the sample variances. With many models it tends to ``per_example`` with means.
    - ``per_example``: normal, standard deviation with ddof 0 (plus 1e-30, as in the authors' code).
    - ``fixed``: normal, one standard deviation for all samples and both sides: of all phi IN (offline: OUT) of the
      others. It scales the scores of one target and leaves their order alone.

    Args:
        phi: [K, N] or [K, N, Q], floating point, finite; ln(p / (1 - p)) of the label's probability p.
        membership: [K, N], bool: model k was trained on sample i.
        target: row of the attacked model, or None for every row; statistics come from other rows only, less one
            model per sample where the split is balanced (see the module).
        mode: "online" needs IN and OUT models for every sample, "offline" OUT models only (one-sided: only a phi
            above the OUT models speaks for a member).
        variance: "shrinkage", "per_example" or "fixed".
        center: location for the normal fits, "median" or "mean"; without effect on "shrinkage".

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError: a wrong dtype, or ``target`` not an integer.
        ValueError: a wrong shape or option, a value not finite, ``target`` out of range, or a sample with too few
            models on a needed side: 1, for "per_example" 2; for "shrinkage" 1, and 2 for some sample.

    Source: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, algorithm 1. Shrinkage:
        the idea of a conjugate prior is that of Brännvall, arXiv 2603.11799 (BaVarIA); the posterior is in Gelman et
        al., "Bayesian Data Analysis", section 3.3; the choice of the prior is ours.
    """
    values = _signal("phi", phi)
    member = _membership(membership, values)
    _choice("mode", mode, ("online", "offline"))
    _choice("variance", variance, ("shrinkage", "per_example", "fixed"))
    _choice("center", center, ("median", "mean"))
    rows = _targets(target, values)
    least, some = {"shrinkage": (1, 2), "per_example": (2, 2), "fixed": (1, 1)}[variance]
    scores = np.empty((len(rows), member.shape[1]))
    for row, chosen in zip(scores, rows, strict=True):
        inside, outside = _others(member, chosen)
        _enough(outside, "OUT", chosen, least, some)
        if mode == "online":
            _enough(inside, "IN", chosen, least, some)
        deviation = None
        if variance == "fixed":
            deviation = float(values[:, inside if mode == "online" else outside].std())
        z, log_out = _fit(values, outside, chosen, variance, center, deviation)
        if mode == "online":
            row[:] = _fit(values, inside, chosen, variance, center, deviation)[1] - log_out
        else:
            row[:] = z
    return scores if target is None else scores[0]


def rmia(
    logprob: Array,
    membership: Array,
    target: int | None = None,
    *,
    population: Array | None = None,
    mode: str = "online",
    gamma: float = 2.0,
    a: float = 0.3,
) -> Floats:
    """score(x) = share of z in the population with r(x) / r(z) > gamma, where r(x) = p(x | target) / p(x).

    Computed as the rank of ln r(x) - ln gamma among the sorted ln r(z), counting ln r(z) strictly below it: the
    pairwise definition without its matrix. With several queries, ln r is averaged over them first.

    Args:
        logprob: [K, N] or [K, N, Q], floating point, log-probability of the label in nats, at most 0, finite.
        membership: [K, N], bool: model k was trained on sample i.
        target: row of the attacked model, or None for every row.
        population: [M] distinct sample indices, or None for all samples. A target's own members are left out of it,
            and x is never compared with itself.
        mode: "online": p(x) = mean of the other models' probabilities, less one model per sample where the split is
            balanced (see the module). "offline": p(x) = ((1 + a) p_OUT(x) + 1 - a) / 2, p_OUT over OUT models only.
        gamma: above 0.
        a: in [0, 1]; 1 takes p(x) = p_OUT(x). Only "offline" uses it.

    Returns:
        float64 in [0, 1], of shape [N], or [K, N] for ``target`` None. Ties are many at 0 and 1, by definition.

    Raises:
        TypeError: a wrong dtype, or ``target`` not an integer.
        ValueError: a wrong shape or option, a value not finite or above 0, ``target`` or an index out of range, fewer
            than 2 non-members of a target in the population, or a sample without a model to estimate p(x) from.

    Source: Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024;
        "more than" gamma, and not "at least", as in the authors' code.
    """
    values = _logprob(logprob)
    member = _membership(membership, values)
    _choice("mode", mode, ("online", "offline"))
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be above 0 and finite; got {gamma}")
    if not 0 <= a <= 1:
        raise ValueError(f"a must lie in [0, 1]; got {a}")
    pool = _population(population, member.shape[1])
    rows = _targets(target, values)
    scores = np.empty((len(rows), member.shape[1]))
    for row, chosen in zip(scores, rows, strict=True):
        inside, outside = _others(member, chosen)
        use = outside if mode == "offline" else inside | outside
        _enough(use, "OUT" if mode == "offline" else "other", chosen, 1)
        crowd = pool & ~member[chosen]
        size = int(np.count_nonzero(crowd))
        if size < 2:
            raise ValueError(f"population must hold at least 2 non-members of target {chosen}; got {size}")
        ratio = np.zeros(member.shape[1])
        for query in values:
            typical = _log_mean_exp(query, use)
            if mode == "offline":
                with np.errstate(divide="ignore"):  # ln(1 - a) = -inf at a = 1 is what is meant
                    typical = np.logaddexp(np.log1p(a) + typical, np.log1p(-a)) - math.log(2)
            ratio += (query[chosen] - typical) / len(values)
        limit = ratio - math.log(gamma)
        itself = crowd & (ratio < limit)  # only for gamma < 1
        below = np.searchsorted(np.sort(ratio[crowd]), limit, side="left")
        row[:] = (below - itself) / (size - crowd)
    return scores if target is None else scores[0]


def _fit(
    values: Floats, use: Bools, target: int, variance: str, center: str, deviation: float | None
) -> tuple[Floats, Floats]:
    """(z-score, log-density) of the target's signals under the fits to the used models, averaged over queries."""
    z, log_density = np.zeros((2, use.shape[1]))
    for query in values:
        if variance == "shrinkage":
            found = _student(query, use, query[target])
        else:
            found = _normal(query, use, query[target], center, deviation)
        z += found[0] / len(values)
        log_density += found[1] / len(values)
    return z, log_density


def _normal(x: Floats, use: Bools, at: Floats, center: str, deviation: float | None) -> tuple[Floats, Floats]:
    """(z-score, log-density up to a constant) of ``at`` [N] under normals fitted to the used entries of x [K, N]."""
    count, mean, squares = _moments(x, use)
    location = mean if center == "mean" else _median(x, use, count)
    scale = (np.sqrt(squares / count) if deviation is None else deviation) + _FLOOR
    z = (at - location) / scale
    return z, -np.log(scale) - z * z / 2


def _student(x: Floats, use: Bools, at: Floats) -> tuple[Floats, Floats]:
    """(z-score, log-density) of ``at`` [N] under the posterior predictives given the used entries of x [K, N]."""
    count, mean, squares = _moments(x, use)
    alpha, beta = _variance_prior(count, squares)
    prior_mean = mean.mean()
    weight = _PRIOR_WEIGHT + count
    location = (_PRIOR_WEIGHT * prior_mean + count * mean) / weight
    beta_n = beta + squares / 2 + _PRIOR_WEIGHT * count * (mean - prior_mean) ** 2 / (2 * weight)
    alpha_n = alpha + count / 2
    scale = np.sqrt(beta_n * (weight + 1) / (alpha_n * weight))
    z = (at - location) / scale
    half = torch.from_numpy(alpha_n)
    norm = (torch.lgamma(half + 0.5) - torch.lgamma(half)).numpy() - 0.5 * np.log(2 * math.pi * alpha_n)
    return z, norm - np.log(scale) - (alpha_n + 0.5) * np.log1p(z * z / (2 * alpha_n))


def _variance_prior(count: Ints, squares: Floats) -> tuple[float, float]:
    """Inverse-gamma (alpha, beta) with the mean and the spread of the true variances behind the sample variances.

    With E and V their mean and variance, a sample variance of n normal values has variance V + 2 (V + E^2) / (n - 1):
    solved for V, then alpha = 2 + E^2 / V and beta = E (alpha - 1).
    """
    several = count >= 2
    freedom = count[several] - 1
    seen = squares[several] / freedom
    expected = max(float(seen.mean()), _FLOOR**2)
    noise = float(np.mean(2 / freedom))
    spread = (float(seen.var()) - expected**2 * noise) / (1 + noise)
    alpha = 2 + expected**2 / max(spread, _LEAST_SPREAD * expected**2)
    return alpha, expected * (alpha - 1)


def _moments(x: Floats, use: Bools) -> tuple[Ints, Floats, Floats]:
    """Per column: how many entries are used, their mean, and the sum of squares about it."""
    count = use.sum(axis=0)
    mean = np.where(use, x, 0).sum(axis=0) / count
    off = np.where(use, x - mean, 0)
    return count, mean, np.einsum("kn,kn->n", off, off)


def _median(x: Floats, use: Bools, count: Ints) -> Floats:
    rising = np.sort(np.where(use, x, np.inf), axis=0)
    middle = np.take_along_axis(rising, np.stack([(count - 1) // 2, count // 2]), axis=0)
    return middle.mean(axis=0)


def _log_mean_exp(x: Floats, use: Bools) -> Floats:
    masked = np.where(use, x, -np.inf)
    top = masked.max(axis=0)
    return top + np.log(np.exp(masked - top).sum(axis=0) / use.sum(axis=0))


def _others(member: Bools, target: int) -> tuple[Bools, Bools]:
    """[K, N] twice: which models serve a sample as IN and as OUT models against this target (see the module)."""
    inside, outside = member.copy(), ~member
    inside[target] = outside[target] = False
    trained = member.sum(axis=0)
    mixed = np.flatnonzero((trained > 0) & (trained < len(member)))
    own, count = member[target, mixed], inside[:, mixed].sum(axis=0)
    if 0 < own.sum() < own.size and count[own].mean() < count[~own].mean() - 0.5:
        opposite = np.roll(member[:, mixed] != own, -target, axis=0)
        extra = (opposite.argmax(axis=0) + target) % len(member)
        inside[extra, mixed] = outside[extra, mixed] = False
    return inside, outside


def _enough(use: Bools, side: str, target: int, least: int, some: int = 1) -> None:
    """Every sample has at least ``least`` of these models, and some sample has ``some``."""
    count = use.sum(axis=0)
    rest = f"{side} models besides target {target} (and, in a balanced split, besides one more)"
    if count.min() < least:
        worst = int(count.argmin())
        raise ValueError(
            f"membership must give every sample at least {least} {rest}; sample {worst} has {count[worst]}"
        )
    if count.max() < some:
        raise ValueError(f"membership must give some sample at least {some} {rest}; each has {count.max()}")


def _signal(name: str, value: Array) -> Floats:
    """As float64 [Q, K, N]: each query a block of its own."""
    array = to_numpy(name, value, "f")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"{name} must have shape [K, N] or [K, N, Q], none of them 0; got {array.shape}")
    nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    if nan or infinite:
        raise ValueError(f"{name} must be finite; got {nan} NaN and {infinite} infinite of {array.size} values")
    return np.ascontiguousarray(np.moveaxis(np.atleast_3d(array), 2, 0))


def _logprob(value: Array) -> Floats:
    values = _signal("logprob", value)
    if values.max() > 1e-3:  # a log-softmax may exceed 0 by rounding; a loss given by mistake would flip every score
        raise ValueError(f"logprob must be at most 0 (the negative of a loss); got a maximum of {values.max():g}")
    return values


def _membership(value: Array, signals: Floats) -> Bools:
    member = to_numpy("membership", value, "b")
    if member.shape != signals.shape[1:]:
        raise ValueError(f"membership must have shape [K, N] = {signals.shape[1:]}; got {member.shape}")
    return member


def _targets(target: int | None, signals: Floats) -> list[int]:
    models = signals.shape[1]
    if target is None:
        return list(range(models))
    if isinstance(target, bool):
        raise TypeError(f"target must be an integer or None; got {target}")
    try:
        chosen = operator.index(target)
    except TypeError:
        raise TypeError(f"target must be an integer or None; got {type(target).__name__}") from None
    if not 0 <= chosen < models:
        raise ValueError(f"target must lie in [0, {models}); got {chosen}")
    return [chosen]


def _population(value: Array | None, samples: int) -> Bools:
    pool = np.ones(samples, bool)
    if value is None:
        return pool
    index = to_numpy("population", value, "iu")
    if index.ndim != 1:
        raise ValueError(f"population must be one-dimensional; got shape {index.shape}")
    if index.size and not 0 <= index.min() <= index.max() < samples:
        raise ValueError(f"population must hold indices in [0, {samples}); got {index.min()} to {index.max()}")
    if np.unique(index).size != index.size:
        raise ValueError(f"population must hold distinct indices; got {index.size - np.unique(index).size} repeats")
    pool[:] = False
    pool[index] = True
    return pool


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
