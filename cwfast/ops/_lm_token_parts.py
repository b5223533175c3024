"""What a part of the vocabulary knows of each token, how two parts become one, and what all parts together say.

Parts are made of tiles of a rank's rows of the LM head, merged over tiles and then, where the vocabulary is split, over
ranks: ``merge`` gives the same for any order but for rounding, in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """Sums over some tokens v of the vocabulary, u_v = z_v - peak, each ``[N]``, float64 where not said otherwise.

    Attributes:
        peak: the largest logit; -inf where there is none.
        tops: how many logits equal it.
        rest: sum of ``e^u`` over those below it: what stands beside a dominant one keeps its digits.
        slope: sum of ``u e^u``.
        spread: sum of ``e^u (u - mean)^2``, the mean that of u under these weights: nothing cancels.
        above: int64, how many logits are larger than the target's.
        top: int64, the lowest index of the largest logit.
        values: ``[N, k]`` in the precision of the logits: the largest ones, descending, ties by index.
        indices: int64 ``[N, k]``, theirs; the vocabulary's size where there are fewer than k.
    """

    peak: Tensor
    tops: Tensor
    rest: Tensor
    slope: Tensor
    spread: Tensor
    above: Tensor
    top: Tensor
    values: Tensor
    indices: Tensor


def no_parts(like: Tensor, vocabulary: int, topk: int) -> Parts:
    """Of no token at all; ``like`` ``[N, ...]`` says how many rows, where, and in which precision."""
    zeros = like.new_zeros((5, len(like)), dtype=torch.float64)
    zeros[0] = -torch.inf
    counts = like.new_zeros((2, len(like)), dtype=torch.int64)
    counts[1] = vocabulary
    values = like.new_full((len(like), topk), -torch.inf)
    peak, tops, rest, slope, spread = zeros
    above, top = counts
    indices = torch.full_like(values, vocabulary, dtype=torch.int64)
    return Parts(peak, tops, rest, slope, spread, above, top, values, indices)


def merge(a: Parts, b: Parts) -> Parts:
    """Of two disjoint parts of the vocabulary, both with indices into the whole one (Chan's update of the variance)."""
    peak = torch.maximum(a.peak, b.peak)  # NaN stays
    sums = []
    for part in (a, b):
        shift = torch.where(part.peak == -torch.inf, 0, part.peak - peak)
        factor = torch.where(part.peak == -torch.inf, 0, shift.exp())
        weight = part.tops + part.rest
        equal = part.peak == peak
        mean = torch.where(weight > 0, part.slope / weight, 0) + shift
        sums.append(
            (
                torch.where(equal, part.tops, 0),
                torch.where(equal, part.rest, factor * weight),
                factor * (part.slope + shift * weight),
                factor * part.spread,
                factor * weight,
                mean,
            )
        )
    tops, rest, slope, spread = (x + y for x, y in zip(sums[0][:4], sums[1][:4], strict=True))
    (weight_a, mean_a), (weight_b, mean_b) = (s[4:] for s in sums)
    both = torch.where(peak == -torch.inf, 1, tops + rest)
    spread = spread + weight_a * weight_b / both * (mean_a - mean_b).square()
    first = (a.peak > b.peak) | ((a.peak == b.peak) & (a.top < b.top))
    values, indices = torch.cat([a.values, b.values], dim=1), torch.cat([a.indices, b.indices], dim=1)
    order = indices.argsort(dim=1)
    order = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))[
        :, : a.values.shape[1]
    ]
    return Parts(
        peak,
        tops,
        rest,
        slope,
        spread,
        a.above + b.above,
        torch.where(first, a.top, b.top),
        values.gather(1, order),
        indices.gather(1, order),
    )


def finish(parts: Parts, target_logit: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_token_stats``, from the parts of the whole vocabulary."""
    dtype = target_logit.dtype
    good = parts.peak.isfinite()
    log_sum = parts.tops.log() + torch.log1p(parts.rest / parts.tops)
    weight = parts.tops + parts.rest
    entropy = log_sum - parts.slope / weight
    values = (
        (target_logit.double() - parts.peak) - log_sum,
        parts.peak + log_sum,
        -entropy,
        parts.spread / weight,
        entropy,
    )
    logprob, logsumexp, mean, variance, entropy = (torch.where(good, value, torch.nan) for value in values)
    top = torch.where(good[:, None], (parts.values.double() - parts.peak[:, None]) - log_sum[:, None], torch.nan)
    return (
        *(x.to(dtype) for x in (logprob, logsumexp, mean, variance, entropy)),
        torch.where(good, parts.above, -1),
        good & (parts.top == targets),
        top.to(dtype),
        torch.where(good[:, None] & (parts.values > -torch.inf), parts.indices, -1),
        split(logsumexp, dtype),
    )


def split(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, 2]``: float64 values as rounded, and what that lost."""
    rounded = value.to(dtype)
    return torch.stack([rounded, (value - rounded.double()).to(dtype)], dim=1)
