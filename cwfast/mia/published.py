"""Signals as other authors' released code computes them, for comparison with their numbers; ours are in ``Signals``."""

import warnings

import torch
from torch import Tensor

_LEAST = 1e-45  # LiRA's code adds it to each probability: phi stays within +-103.6


def phi_carlini(logits: Tensor, labels: Tensor) -> Tensor:
    """phi = ln(p_y + 1e-45) - ln(sum_{c != y} p_c + 1e-45), p the softmax in float64.

    ``ops.logit_stats`` gives z_y - lse_{c != y} z_c instead: the same number, without the bounds and without the digits
    that are lost where p_y is close to 0 or 1.

    Args:
        logits: [K, N, C] or [K, N, Q, C], floating point.
        labels: [N] int64, each in 0 .. C - 1.

    Returns:
        float64 [K, N] or [K, N, Q].

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or a label out of range.

    Source: ``research/mi_lira_2021/score.py`` of the repository tensorflow/privacy.
    """
    index = _index(logits, labels)
    p = (logits - logits.amax(dim=-1, keepdim=True)).exp().double()
    p = p / p.sum(dim=-1, keepdim=True)
    own = p.gather(-1, index)
    rest = p.scatter(-1, index, 0.0).sum(dim=-1)
    return (own[..., 0] + _LEAST).log() - (rest + _LEAST).log()


def taylor_logprob(
    logits: Tensor, labels: Tensor, *, temperature: float = 2.0, margin: float = 0.6, degree: int = 3
) -> Tensor:
    """ln p_y of the SM-Taylor softmax: p_y = t(u_y - m) / (sum_c t(u_c) - t(u_y) + t(u_y - m)), u = z / T.

    t(u) = sum_{i <= degree} u^i / i!: RMIA's signal for images, to be given to `rmia` as ``logprob``. Of an odd degree
    (the authors' is 3) t is negative for a u far below 0, so that "probabilities" may lie outside [0, 1]; those are set
    to 0 or 1, and a warning tells how many. An even degree is always positive.

    Args:
        logits: [K, N, C] or [K, N, Q, C], floating point, finite.
        labels: [N] int64, each in 0 .. C - 1.
        temperature: T, above 0; the authors' is 2 for CIFAR-10 and CINIC-10, 1 for CIFAR-100.
        margin: m.
        degree: of the polynomial, at least 1.

    Returns:
        float64 [K, N] or [K, N, Q], at most 0; -inf for a probability of 0.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, a label out of range, or an option out of range.

    Source: Banerjee et al., "Exploring Alternatives to Softmax Function", 2020; ``research/2024_rmia/signals.py`` of
        the repository privacytrustlab/ml_privacy_meter, whose n = 4 terms are degree 3.
    """
    index = _index(logits, labels)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    if degree < 1:
        raise ValueError(f"degree must be at least 1; got {degree}")
    u = logits.double() / temperature
    own = u.gather(-1, index)
    with_margin = _taylor(own - margin, degree)[..., 0]
    total = (_taylor(u, degree).sum(dim=-1, keepdim=True) - _taylor(own, degree))[..., 0] + with_margin
    p = with_margin / total
    odd = int(((total <= 0) | ~((p >= 0) & (p <= 1))).sum())
    if odd:
        warnings.warn(
            f"{odd} of {p.numel()} probabilities of the Taylor softmax of degree {degree} lie outside [0, 1] or have a "
            "denominator that is not positive; an even degree has none",
            stacklevel=2,
        )
    return torch.where(total > 0, p, 0).clamp(0, 1).log()


def _taylor(u: Tensor, degree: int) -> Tensor:
    """The exponential series up to u^degree, by Horner's rule."""
    result = torch.ones_like(u)
    for i in range(degree, 0, -1):
        result = 1 + u / i * result
    return result


def _index(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels as an index into the last dimension of the logits."""
    if not logits.is_floating_point() or labels.dtype != torch.int64:
        raise TypeError(f"logits must be floating point and labels int64; got {logits.dtype} and {labels.dtype}")
    if logits.ndim not in (3, 4) or labels.shape != logits.shape[1:2]:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits must have shape [K, N, C] or [K, N, Q, C], labels [N]; got {shapes}")
    classes = logits.shape[-1]
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels must lie in [0, {classes}); got {int(labels.min())} to {int(labels.max())}")
    each = labels.to(logits.device).view(-1, 1) if logits.ndim == 3 else labels.to(logits.device).view(-1, 1, 1)
    return each.expand(*logits.shape[:-1], 1)
