"""LiRA: is the target's signal more like those of models trained on a sample, or like those of models that were not?"""

import math

import numpy as np
import torch

from cwfast.mia import _inputs, _shadows
from cwfast.mia._inputs import Array, Bools, Floats, Ints

_FLOOR = 1e-30  # keeps a standard deviation of 0 (all models agree) from dividing by 0
_PRIOR_WEIGHT = 0.1  # of the prior mean, in models: enough to bound a mean of one model, lost among several
_LEAST_SPREAD = 1e-3  # of the variances between samples, relative to their mean squared: bounds alpha at 1002


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
        phi: [K, N] or [K, N, Q], floating point, no NaN; ln(p / (1 - p)) of the label's probability p. An
            infinite one counts as the farthest finite one, at least 103.6, where the authors' code ends.
        membership: [K, N], bool: model k was trained on sample i.
        target: row of the attacked model, or None for every row; statistics come from other rows only, less one
            model per sample where the split is balanced (see `cwfast.mia.attacks`).
        mode: "online" needs IN and OUT models for every sample, "offline" OUT models only (one-sided: only a phi
            above the OUT models speaks for a member).
        variance: "shrinkage", "per_example" or "fixed".
        center: location for the normal fits, "median" or "mean"; without effect on "shrinkage".

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError: a wrong dtype, or ``target`` not an integer.
        ValueError: a wrong shape or option, a value NaN, ``target`` out of range, or a sample with too few
            models on a needed side: 1, for "per_example" 2; for "shrinkage" 1, and 2 for some sample.

    Source: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, algorithm 1. Shrinkage:
        the idea of a conjugate prior is that of Brännvall, arXiv 2603.11799 (BaVarIA); the posterior is in Gelman et
        al., "Bayesian Data Analysis", section 3.3; the choice of the prior is ours.
    """
    values = _inputs.phi(phi)
    member = _inputs.membership(membership, values)
    _inputs.choice("mode", mode, ("online", "offline"))
    _inputs.choice("variance", variance, ("shrinkage", "per_example", "fixed"))
    _inputs.choice("center", center, ("median", "mean"))
    rows = _inputs.targets(target, values)
    least, some = {"shrinkage": (1, 2), "per_example": (2, 2), "fixed": (1, 1)}[variance]
    inside, outside = _shadows.sides(member, rows)
    _shadows.enough(outside.left, "OUT", rows, least, some)
    z, log_out = _fits(values, outside, rows, variance, center)
    if mode == "online":
        _shadows.enough(inside.left, "IN", rows, least, some)
        log_in = _fits(values, inside, rows, variance, center)[1]
    if variance == "fixed":
        deviation = _pooled(values, inside if mode == "online" else outside, len(rows)) + _FLOOR
        scores = z / deviation if mode == "offline" else (log_in - log_out) / deviation**2
    else:
        scores = z if mode == "offline" else log_in - log_out
    return scores if target is None else scores[0]


def lira_carlini(
    phi: Array, membership: Array, target: int | None = None, *, mode: str = "online", fixed_variance: bool = False
) -> Floats:
    """online: mean_q [log N(phi; m_IN, s_IN) - log N(phi; m_OUT, s_OUT)]; offline: mean_q -log N(phi; m_OUT, s_OUT).

    For comparison with the authors' released code, quirks included: medians and deviations (ddof 0, plus 1e-30) of the
    first n models of a side, n the fewest that any sample has; with ``fixed_variance`` one deviation of all that is
    kept IN, also for OUT (offline: of all OUT); offline is two-sided: a phi far below the OUT models counts as a
    member's too. Every other model is a shadow model, also where that betrays the target (see `cwfast.mia.attacks`).
    Their code gives the negative.

    Args:
        phi: [K, N] or [K, N, Q], floating point, no NaN; infinite ones as for `lira`.
        membership: [K, N], bool.
        target: row of the attacked model, or None for every row (each computed by itself).
        mode: "online" or "offline".
        fixed_variance: one deviation for all samples.

    Returns:
        float64 [N], or [K, N] for ``target`` None.

    Raises:
        TypeError, ValueError: as for `lira`; a needed side must have a model for every sample.

    Source: ``research/mi_lira_2021/plot.py`` of the repository tensorflow/privacy.
    """
    values = _inputs.phi(phi)
    member = _inputs.membership(membership, values)
    _inputs.choice("mode", mode, ("online", "offline"))
    rows = _inputs.targets(target, values)
    scores = np.zeros((len(rows), member.shape[1]))
    for row, chosen in zip(scores, rows, strict=True):
        others = np.arange(len(member)) != chosen
        needed = [("OUT", ~member[others])] + [("IN", member[others])] * (mode == "online")
        kept = []
        for side, use in needed:
            _shadows.enough(use.sum(axis=0)[None], side, [chosen], 1)
            kept.append(_first(values[:, others], use))
        fixed = float(kept[-1].std()) if fixed_variance else None
        logs = []
        for side_values in kept:
            scale = (side_values.std(axis=1) if fixed is None else fixed) + _FLOOR
            z = (values[:, chosen] - np.median(side_values, axis=1)) / scale
            logs.append((-np.log(scale) - 0.5 * math.log(2 * math.pi) - z * z / 2).mean(axis=0))
        row[:] = logs[1] - logs[0] if mode == "online" else -logs[0]
    return scores if target is None else scores[0]


def _first(values: Floats, use: Bools) -> Floats:
    """[Q, n, N]: per sample the first n used models, n the fewest of any sample."""
    order = np.argsort(~use, axis=0, kind="stable")[: use.sum(axis=0).min()]
    return np.take_along_axis(values, order[None], axis=1)


def _fits(values: Floats, side: _shadows.Side, targets: list[int], variance: str, center: str) -> tuple[Floats, Floats]:
    """(z-score, log-density) [targets, N] of the targets' signals under the fits to a side, averaged over queries.

    For "fixed" without its deviation: (distance from the location, minus half its square).
    """
    z, log_density = np.zeros((2, len(targets), values.shape[2]))
    for query in values:
        found = _shadows.moments(query, side.use, median=variance != "shrinkage" and center == "median")
        for row, target in enumerate(targets):
            count, squares = side.left[row], side.pick(found.squares, row)
            if variance == "shrinkage":
                fit = _student(count, side.pick(found.mean, row), squares, query[target])
            else:
                location = side.pick(found.mean if found.median is None else found.median, row)
                fit = _normal(query[target] - location, None if variance == "fixed" else squares / count)
            z[row] += fit[0] / len(values)
            log_density[row] += fit[1] / len(values)
    return z, log_density


def _normal(off: Floats, variance: Floats | None) -> tuple[Floats, Floats]:
    """(z-score, log-density up to a constant) at a distance [N] from the location; variance None: 1."""
    scale = 1.0 if variance is None else np.sqrt(variance) + _FLOOR
    z = off / scale
    return z, -np.log(scale) - z * z / 2


def _student(count: Ints, mean: Floats, squares: Floats, at: Floats) -> tuple[Floats, Floats]:
    """(z-score, log-density) of ``at`` [N] under the posterior predictives."""
    alpha, beta = _variance_prior(count, squares)
    prior_mean = mean.mean()
    weight = _PRIOR_WEIGHT + count
    location = (_PRIOR_WEIGHT * prior_mean + count * mean) / weight
    beta_n = beta + squares / 2 + _PRIOR_WEIGHT * count * (mean - prior_mean) ** 2 / (2 * weight)
    alpha_n = alpha + count / 2
    scale = np.sqrt(beta_n * (weight + 1) / (alpha_n * weight))
    z = (at - location) / scale
    half = torch.from_numpy(alpha + np.arange(count.max() + 1) / 2)  # of every count there may be
    norm = (torch.lgamma(half + 0.5) - torch.lgamma(half) - 0.5 * torch.log(2 * math.pi * half)).numpy()[count]
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


def _pooled(values: Floats, side: _shadows.Side, targets: int) -> Floats:
    """[targets, 1]: the standard deviation of all the signals that a side has against a target."""
    count, mean, squares = np.zeros((3, targets))
    for query in values:
        found = _shadows.moments(query, side.use)
        for row, left in enumerate(side.left):
            means, total = side.pick(found.mean, row), left.sum()
            middle = (left * means).sum() / total
            inner = side.pick(found.squares, row).sum() + (left * (means - middle) ** 2).sum()
            apart = middle - mean[row]  # two groups become one
            squares[row] += inner + apart**2 * count[row] * total / (count[row] + total)
            mean[row] += apart * total / (count[row] + total)
            count[row] += total
    return np.sqrt(squares / count)[:, None]
