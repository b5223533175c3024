"""lm_token_stats and lm_token_kl by tiles of rows and vocabulary: torch multiplies."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cwfast.ops._lm_token_parts import Parts, finish, merge, no_parts
from cwfast.reference import LMHead

ROWS, COLUMNS = 1024, 1024  # of a tile


def stats(hidden: Tensor, head: LMHead, targets: Tensor, topk: int) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_token_stats``."""
    target_logit = target_logits(hidden, head, targets)
    parts = parts_of(hidden, head, targets, target_logit, topk, 0, len(head.weight))
    return finish(parts, target_logit, targets)


def pieces(count: int, size: int) -> Iterator[slice]:
    """Of at most ``size``, one after the other."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def logits(h: Tensor, head: LMHead, columns: slice) -> Tensor:
    """Of a tile; ``h`` is in the precision in which all is computed."""
    z = h @ head.weight[columns].to(h.dtype).T
    if head.bias is not None:
        z += head.bias[columns].to(z.dtype)
    z *= head.scale
    return z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap


def target_logits(hidden: Tensor, head: LMHead, targets: Tensor, first: int = 0) -> Tensor:
    """``[N]``, summed in float64; -inf for targets outside of the tokens ``first ...`` that the head has."""
    out = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.promote_types(hidden.dtype, torch.float32))
    here = ((targets >= first) & (targets < first + len(head.weight))).nonzero()[:, 0]
    for piece in pieces(len(here), 256):
        rows = here[piece]
        tokens = targets[rows] - first
        z = (hidden[rows].double() * head.weight[tokens].double()).sum(dim=1)
        if head.bias is not None:
            z += head.bias[tokens].double()
        z *= head.scale
        out[rows] = (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)).to(out.dtype)
    return out


def parts_of(
    hidden: Tensor, head: LMHead, targets: Tensor, target_logit: Tensor, topk: int, first: int, vocabulary: int
) -> Parts:
    """Of the tokens ``first ...`` that the head has, of ``vocabulary`` in all."""
    found = []
    for rows in pieces(len(hidden), ROWS):
        h = hidden[rows].to(target_logit.dtype)
        parts = no_parts(h, vocabulary, topk)
        for columns in pieces(len(head.weight), COLUMNS):
            z = logits(h, head, columns)
            parts = merge(parts, _tile(z, targets[rows], target_logit[rows], topk, first + columns.start, vocabulary))
        found.append(parts)
    return Parts(*map(torch.cat, zip(*found, strict=True))) if found else no_parts(target_logit, vocabulary, topk)


def _tile(z: Tensor, targets: Tensor, target_logit: Tensor, topk: int, first: int, vocabulary: int) -> Parts:
    inside = ((targets >= first) & (targets < first + z.shape[1])).nonzero()[:, 0]
    z[inside, targets[inside] - first] = target_logit[inside]
    peak = z.amax(dim=1)
    top = (z == peak[:, None]).to(torch.int8).argmax(dim=1)
    u = torch.where(z == -torch.inf, torch.finfo(z.dtype).min, z - peak[:, None])
    w = u.exp()
    tops = (u == 0).sum(dim=1).double()
    slope = (w * u).sum(dim=1).double()
    rest = torch.where(u == 0, 0, w).sum(dim=1).double()
    mean = slope / (tops + rest)
    spread = (w * (u - mean[:, None].to(z.dtype)).square()).sum(dim=1).double()
    order = z.sort(dim=1, descending=True, stable=True)
    count = min(topk, z.shape[1])
    parts = no_parts(z, vocabulary, topk)
    parts.values[:, :count], parts.indices[:, :count] = order.values[:, :count], order.indices[:, :count] + first
    above = (z > target_logit[:, None]).sum(dim=1)
    return Parts(peak.double(), tops, rest, slope, spread, above, top + first, parts.values, parts.indices)


def _probabilities(z: Tensor, sums: Tensor) -> Tensor:
    """``e^(z - logsumexp)``; the sums are given as rounded, and what that lost."""
    return ((z - sums[:, :1]) - sums[:, 1:]).exp_()


def logprob_backward(
    grad: Tensor, sums: Tensor, hidden: Tensor, head: LMHead, targets: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_logprob_backward``."""

    def grad_logits(z: Tensor, rows: slice, columns: slice) -> Tensor:
        g = grad[rows].to(z.dtype)
        dz = _probabilities(z, sums[rows]).mul_(-g[:, None])
        inside = ((targets[rows] >= columns.start) & (targets[rows] < columns.stop)).nonzero()[:, 0]
        dz[inside, targets[rows][inside] - columns.start] += g[inside]
        return dz

    return _backward(hidden, head, needs, sums.dtype, grad_logits)


def _backward(
    hidden: Tensor,
    head: LMHead,
    needs: Sequence[bool],
    dtype: torch.dtype,
    grad_logits: Callable[[Tensor, slice, slice], Tensor],
) -> tuple[Tensor, ...]:
    """Gradients at hidden, weight and bias (empty where not needed), from those at each tile of logits.

    The vocabulary is the outer loop: a tile of weights is summed over all tokens before it is rounded.
    """
    nothing = hidden.new_empty(0)
    grad_hidden = torch.zeros_like(hidden, dtype=dtype, memory_format=torch.contiguous_format) if needs[0] else nothing
    grad_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if needs[1] else nothing
    grad_bias = torch.empty_like(head.bias) if head.bias is not None and needs[2] else nothing
    for columns in pieces(len(head.weight), COLUMNS):
        w = head.weight[columns].to(dtype)
        sum_weight, sum_bias = torch.zeros_like(w), w.new_zeros(len(w))
        for rows in pieces(len(hidden), ROWS):
            h = hidden[rows].to(dtype)
            z = logits(h, head, columns)
            dz = grad_logits(z, rows, columns)
            dz *= head.scale
            if head.softcap is not None:
                dz *= 1 - (z / head.softcap).square_()
            if needs[0]:
                grad_hidden[rows].addmm_(dz, w)
            if needs[1]:
                sum_weight.addmm_(dz.T, h)
            sum_bias += dz.sum(dim=0)
        if needs[1]:
            grad_weight[columns] = sum_weight
        if head.bias is not None and needs[2]:
            grad_bias[columns] = sum_bias
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def kl(hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead) -> tuple[Tensor, Tensor, Tensor]:
    """The results of ``torch.ops.cwfast.lm_token_kl``."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    out = hidden.new_empty(len(hidden), dtype=dtype)
    sums = [hidden.new_empty((len(hidden), 2), dtype=dtype) for _ in range(2)]
    for rows in pieces(len(hidden), ROWS):
        h, k = hidden[rows].to(dtype), ref_hidden[rows].to(dtype)
        peaks = h.new_full((2, len(h)), -torch.inf, dtype=torch.float64)  # of the model, and of the reference
        totals, gap = torch.zeros_like(peaks), torch.zeros_like(peaks[0])
        for columns in pieces(len(head.weight), COLUMNS):
            z, r = logits(h, head, columns), logits(k, ref_head, columns)
            new = torch.maximum(peaks, torch.stack([z.amax(dim=1), r.amax(dim=1)]).double())
            old = torch.where(peaks == -torch.inf, 0, (peaks - new).exp())
            safe = torch.where(new == -torch.inf, 0, new)
            q = (r - safe[1, :, None].to(dtype)).exp()
            totals = totals * old
            totals[0] += (z - safe[0, :, None].to(dtype)).exp().sum(dim=1)
            totals[1] += q.sum(dim=1)
            gap = gap * old[1] + (q * (r - z).masked_fill_(q == 0, 0)).sum(dim=1)
            peaks = new
        log_sums = peaks + totals.log()
        good = peaks.isfinite().all(dim=0)
        divergence = gap / totals[1] - (log_sums[1] - log_sums[0])
        out[rows] = torch.where(good, divergence.clamp(min=0), torch.nan).to(dtype)
        for both, exact in zip(sums, log_sums, strict=True):
            both[rows, 0] = exact.to(dtype)
            both[rows, 1] = (exact - both[rows, 0].double()).to(dtype)
    return out, sums[0], sums[1]


def kl_backward(
    grad: Tensor,
    sums: Tensor,
    ref_sums: Tensor,
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_head: LMHead,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_token_kl_backward``."""

    def grad_logits(z: Tensor, rows: slice, columns: slice) -> Tensor:
        r = logits(ref_hidden[rows].to(z.dtype), ref_head, columns)
        p, q = _probabilities(z, sums[rows]), _probabilities(r, ref_sums[rows])
        return (p - q).mul_(grad[rows, None].to(z.dtype))

    return _backward(hidden, head, needs, sums.dtype, grad_logits)
