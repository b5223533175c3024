"""Every primitive in plain PyTorch: obviously right, any floating dtype including float64, any device, not fast.

The other backends are tested against these functions. Arguments were checked by ``cwfast.ops``.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

BLOCK = 1 << 16  # entries of a block in the (low, offset) form


class LogitStats(NamedTuple):
    """Per-row statistics of logits, each ``[N]``; see ``cwfast.ops.logit_stats``."""

    loss: Tensor
    confidence: Tensor
    phi: Tensor
    entropy: Tensor
    modified_entropy: Tensor
    correct: Tensor
    margin: Tensor


class LMHead(NamedTuple):
    """Logits of hidden states h: ``z = scale * (weight h + bias)``, then ``softcap * tanh(z / softcap)``."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


class TopK(NamedTuple):
    """The most likely tokens, most likely first, each ``[N, k]``: log-probabilities and int64 indices."""

    logprob: Tensor
    indices: Tensor


class TokenStats(NamedTuple):
    """Statistics of each token's distribution over the vocabulary, each ``[N]``; see ``cwfast.ops.lm_token_stats``."""

    logprob: Tensor
    logsumexp: Tensor
    mean: Tensor
    variance: Tensor
    entropy: Tensor
    rank: Tensor
    correct: Tensor
    topk: TopK


def accumulate_saliency_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    row_offsets: Sequence[int],
    power: int,
    scale: float,
    factor: Tensor | None,
    grad: Tensor | None,
) -> None:
    """One sample after the other: rows ``row_offsets[b]`` to ``row_offsets[b + 1]`` belong to sample ``b``."""
    inputs, grad_outputs = inputs.to(out.dtype), grad_outputs.to(out.dtype)
    total = torch.zeros_like(out)
    for begin, end in itertools.pairwise(row_offsets):
        sample_grad = grad_outputs[begin:end].T @ inputs[begin:end]
        total += sample_grad.abs().pow(power)
        if grad is not None:
            grad += sample_grad
    if factor is not None:
        total *= factor.to(out.dtype).abs().pow(power)
    out += scale * total


def accumulate_embedding_saliency_(
    out: Tensor,
    owner: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
) -> None:
    """One sample after the other: the tokens with ``owner == b`` belong to sample ``b``."""
    total = torch.zeros_like(out)
    for sample in owner.unique().tolist():
        mine = owner == sample
        gradient = torch.zeros_like(out)
        gradient.index_put_((indices[mine],), grad_outputs[mine].to(out.dtype), accumulate=True)
        total += gradient.abs().pow(power)
    if factor is not None:
        total *= factor.to(out.dtype).abs().pow(power)
    out += scale * total


def select_topk(scores: Sequence[Tensor], k: int) -> tuple[list[Tensor], float]:
    """A stable sort of everything. Scores are valid, and NaN (never selected) stands for itself.

    Returns one flat bool mask per tensor and the k-th largest score (inf for k = 0).
    """
    flat = torch.cat([score.reshape(-1) for score in scores]) if scores else torch.empty(0)
    key = torch.where(flat.isnan(), torch.full_like(flat, -1), flat)  # below every score
    order = torch.sort(key, descending=True, stable=True).indices[:k]
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[order] = True
    threshold = float(flat[order[-1]]) if k else float("inf")
    return list(mask.split([score.numel() for score in scores])), threshold


def unpack(bits: Tensor, numel: int) -> Tensor:
    """Packed bits ``uint8`` -> flat bool ``[numel]``: entry i is bit ``i % 8`` of byte ``i // 8``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).bool().reshape(-1)[:numel]


def pack(mask: Tensor) -> Tensor:
    """Bool tensor of any shape -> packed bits ``uint8``, zero-padded to a multiple of 8 bytes; inverse of unpack."""
    flat = mask.reshape(-1)
    padded = torch.zeros((flat.numel() + 63) // 64 * 64, dtype=torch.uint8, device=mask.device)
    padded[: flat.numel()] = flat
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.reshape(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def indices_of(bits: Tensor, offset: Tensor | None, numel: int) -> Tensor:
    """Selected entries, int64 ascending flat indices, from packed bits or from (low, offset)."""
    if offset is None:
        return unpack(bits, numel).nonzero().reshape(-1)
    block = torch.repeat_interleave(torch.arange(len(offset) - 1, device=offset.device), offset.diff())
    return block * BLOCK + bits.to(torch.int64)


def rewind_(weight: Tensor, initial: Tensor, indices: Tensor) -> None:
    """``weight[indices] = initial[indices]`` by flat logical index."""
    scatter_(weight, indices, gather(initial, indices))


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries at these flat logical indices."""
    return (
        weight.detach()[torch.unravel_index(indices, weight.shape)]
        if weight.ndim
        else weight.detach().expand(len(indices)).clone()
    )


def scatter_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """``weight[indices] = values`` by flat logical index."""
    if weight.ndim == 0:
        weight.detach().copy_(values[0] if len(values) else weight.detach())
    else:
        weight.detach().index_put_(torch.unravel_index(indices, weight.shape), values)


def logit_stats(logits: Tensor, labels: Tensor) -> LogitStats:
    """Formulas and sources: ``cwfast.ops.logit_stats``."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = torch.log_softmax(z, dim=1)
    p = log_p.exp()
    row = labels[:, None]
    is_label = torch.zeros_like(z, dtype=torch.bool).scatter_(1, row, True)
    others = z.masked_fill(is_label, -torch.inf)
    label_logit = z.gather(1, row)[:, 0]
    phi = label_logit - others.logsumexp(dim=1)
    log_p_label = logsigmoid(phi)  # keeps the digits of a loss near 0
    # log(1 - p_c): by log1p, but for the most likely class, whose p may round to 1, from all the others
    top = z.argmax(dim=1, keepdim=True)
    log_rest = torch.log1p(-p).scatter(1, top, log_p.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True))
    modified = -torch.sigmoid(-phi) * log_p_label.clamp(min=CLIP)
    modified -= (p * log_rest.clamp(min=CLIP)).masked_fill(is_label, 0).sum(dim=1)
    stats = LogitStats(
        loss=-log_p_label,
        confidence=torch.sigmoid(phi),
        phi=phi,
        entropy=-(p * log_p.clamp(min=torch.finfo(z.dtype).min)).sum(dim=1),
        modified_entropy=modified,
        correct=z.argmax(dim=1) == labels,
        margin=label_logit - others.amax(dim=1),
    )
    no_softmax = ~z.amax(dim=1).isfinite()
    blank = dict.fromkeys(LogitStats._fields, torch.nan) | {"correct": False}
    return LogitStats(*(x.masked_fill(no_softmax, blank[name]) for name, x in stats._asdict().items()))


CLIP = -69.07755278982137  # log(1e-30): where Song & Mittal's code clips its logarithms


def lm_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """The whole ``[N, V]``, in float32 (float64 for float64)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        z = hidden.to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        z = z + head.bias.to(dtype)
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def lm_logits_backward(grad: Tensor, hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gradient ``[N, V]`` at ``lm_logits``: those at hidden, weight and bias, in the dtype of ``lm_logits``."""
    if head.softcap is not None:
        grad = grad * (1 - (lm_logits(hidden, head) / head.softcap).square())
    grad = grad * head.scale
    with torch.autocast(hidden.device.type, enabled=False):
        return grad @ head.weight.to(grad.dtype), grad.T @ hidden.to(grad.dtype), grad.sum(dim=0)


def lm_token_stats(hidden: Tensor, head: LMHead, targets: Tensor, topk: int) -> TokenStats:
    """Formulas and sources: ``cwfast.ops.lm_token_stats``."""
    z, row = lm_logits(hidden, head), targets[:, None]
    log_p = torch.log_softmax(z, dim=1)
    p = log_p.exp()
    surprise = log_p.masked_fill(p == 0, 0)  # what has no probability has no part in the sums
    mean = (p * surprise).sum(dim=1)
    order = z.sort(dim=1, descending=True, stable=True).indices
    no_softmax = ~z.amax(dim=1).isfinite()
    most = log_p.gather(1, order[:, :topk])
    lost = no_softmax[:, None]
    return TokenStats(
        logprob=log_p.gather(1, row)[:, 0].masked_fill(no_softmax, torch.nan),
        logsumexp=z.logsumexp(dim=1).masked_fill(no_softmax, torch.nan),
        mean=mean.masked_fill(no_softmax, torch.nan),
        variance=(p * (surprise - mean[:, None]).square()).sum(dim=1).masked_fill(no_softmax, torch.nan),
        entropy=(-mean).masked_fill(no_softmax, torch.nan),
        rank=(z > z.gather(1, row)).sum(dim=1).masked_fill(no_softmax, -1),
        correct=(order[:, 0] == targets) & ~no_softmax,
        topk=TopK(most.masked_fill(lost, torch.nan), order[:, :topk].masked_fill(~(most > -torch.inf), -1)),
    )


def lm_token_kl(hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead) -> Tensor:
    """Formula: ``cwfast.ops.lm_token_kl``."""
    log_p = torch.log_softmax(lm_logits(hidden, head), dim=1)
    log_q = torch.log_softmax(lm_logits(ref_hidden, ref_head), dim=1)
    q = log_q.exp()
    return (q * (log_q - log_p).masked_fill(q == 0, 0)).sum(dim=1)
