"""lm_token_stats and lm_token_kl on devices: launches for triton and cuda, and what their chunks of the vocabulary say.

A kernel folds the logits of a chunk into a few numbers per token; the chunks are merged here, in float64. The backward
passes compute tiles of the loss's gradient at the logits into a workspace and let torch multiply; so does topk, a second
pass over the vocabulary, whose tiles of logits torch searches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cwfast import _backends
from cwfast.errors import BackendUnavailable
from cwfast.ops._lm_token_parts import Parts, finish, no_parts
from cwfast.ops._lm_token_tiles import pieces

TARGET, STATS, KL, LOGITS, LOGPROB_GRAD, KL_GRAD = range(6)  # CwfastLmTask of csrc/cuda/launchers.h
TILE = 128  # tokens, words
PROGRAMS = 8  # for each multiprocessor: the last ones to end keep few of them waiting
WORKSPACE = 64 << 20  # bytes of a tile of gradients
SEARCHED = 2 << 20  # logits of which topk sorts keys at once: 24 bytes each
LAST = 2**31 - 1


class Head(NamedTuple):
    """Hidden states ``[N, d]``, LM head ``[V, d]``, and bias ``[V]`` float32 or None, as the kernels read them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def part(self, rows: slice, columns: slice) -> "Head":
        bias = None if self.bias is None else self.bias[columns]
        return Head(self.hidden[rows], self.weight[columns], bias)


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Head:
    """Rows whose entries are not adjacent are copied."""
    if hidden.dtype == torch.float64:
        raise BackendUnavailable(
            f"backend {backend!r} runs lm_token_stats and lm_token_kl in {_backends.CUDA_DTYPES}; got {hidden.dtype}: "
            "use 'reference'"
        )
    hidden, weight = (x.detach() if x.stride(1) == 1 else x.detach().contiguous() for x in (hidden, weight))
    return Head(hidden, weight, None if bias is None else bias.detach().float().contiguous())


def _launch(
    backend: str,
    task: int,
    model: Head,
    scale: float,
    softcap: float | None,
    *,
    reference: Head | None = None,
    chunks: int = 0,
    chunk: int = 0,
    targets: Tensor | None = None,
    logit: Tensor | None = None,
    partial: Tensor | None = None,
    counts: Tensor | None = None,
    out: Tensor | None = None,
    grad: Tensor | None = None,
    logsumexp: Tensor | None = None,
    ref_logsumexp: Tensor | None = None,
) -> None:
    tokens, words = len(model.hidden), len(model.weight)
    if tokens == 0 or words == 0:
        return
    tensors = {"targets": targets, "logit": logit, "partial": partial, "counts": counts, "out": out, "grad": grad}
    tensors |= {"logsumexp": logsumexp, "ref_logsumexp": ref_logsumexp}
    if backend == "triton":
        kernels = _backends.triton_kernels("lm_token_stats")
        kernels.launch(task, model, reference, scale, softcap, chunks, chunk, **tensors)
        return
    address = {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}

    def head(x: Head | None) -> tuple[int, ...]:
        if x is None:
            return (0,) * 6
        bias = 0 if x.bias is None else x.bias.data_ptr()
        strides = x.hidden.stride(0), x.weight.stride(0)
        return x.hidden.data_ptr(), x.weight.data_ptr(), bias, *strides, x.hidden.shape[1]

    device, dtype = model.hidden.device, _backends.cuda_dtype("lm_token_stats", model.hidden.dtype)
    _backends.native().cuda_lm_tokens(
        task, head(model), head(reference), tokens, words, dtype, scale, softcap or 0.0,
        address["targets"], address["logit"], chunks, chunk, address["partial"], address["counts"], address["out"],
        address["grad"], address["logsumexp"], address["ref_logsumexp"],
        device.index or 0, _backends.cuda_stream(device),
    )  # fmt: skip


def chunks_of(tokens: int, words: int, device: torch.device) -> tuple[int, int]:
    """How many chunks the words are taken in, and how many words one has, a multiple of TILE."""
    cuda = device.type == "cuda"
    have = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    tiles = -(-words // TILE)
    each = -(-tiles // max(1, min(tiles, -(-PROGRAMS * have // max(1, -(-tokens // TILE))))))
    return -(-tiles // max(1, each)), each * TILE


def stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    topk: int,
    backend: str,
) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_token_stats``."""
    logit = target_logits(hidden, weight, targets, bias, softcap, scale, 0, backend)
    parts = parts_of(hidden, weight, targets, logit, bias, softcap, scale, topk, 0, len(weight), backend)
    return finish(parts, logit, targets)


def target_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    first: int,
    backend: str,
) -> Tensor:
    """``[N]`` float32; -inf for targets outside of the rows ``first ...`` of the head that weight has."""
    head = _head(hidden, weight, bias, backend)
    out = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    _launch(backend, TARGET, head, scale, softcap, targets=(targets - first).contiguous(), logit=out)
    return out


def parts_of(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_logit: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    topk: int,
    first: int,
    vocabulary: int,
    backend: str,
) -> Parts:
    """Of the tokens ``first ...`` that the rows of weight and bias stand for."""
    head = _head(hidden, weight, bias, backend)
    targets, target_logit = (targets - first).contiguous(), target_logit.contiguous()
    tokens, words = len(hidden), len(weight)
    chunks, chunk = chunks_of(tokens, words, hidden.device)
    entries = chunks * (2 if backend == "cuda" else 1)
    partial = target_logit.new_empty((5, entries, tokens))
    counts = targets.new_empty((2, entries, tokens), dtype=torch.int32)
    _launch(
        backend, STATS, head, scale, softcap,
        chunks=chunks, chunk=chunk, targets=targets, logit=target_logit, partial=partial, counts=counts,
    )  # fmt: skip
    parts = no_parts(target_logit, vocabulary, topk)
    if tokens and words:
        parts = _joined(partial.double(), counts, first, parts)
    if topk and tokens and words:
        values, indices = _largest(head, targets, target_logit, scale, softcap, topk, backend)
        count = values.shape[1]
        parts.values[:, :count], parts.indices[:, :count] = values, indices + first
    return parts


def _joined(partial: Tensor, counts: Tensor, first: int, nothing: Parts) -> Parts:
    """Of all chunks: as ``_lm_token_parts.merge``, at once."""
    peaks, tops, rest, means, spreads = partial
    peak = peaks.amax(dim=0)
    shift = torch.where(peaks == -torch.inf, 0, peaks - peak)
    factor = torch.where(peaks == -torch.inf, 0, shift.exp())
    equal = peaks == peak
    weights = factor * (tops + rest)
    slopes = torch.where(weights > 0, weights * (means + shift), 0)
    total = weights.sum(dim=0)
    mean = slopes.sum(dim=0) / total
    apart = torch.where(weights > 0, weights * (means + shift - mean).square(), 0)
    return nothing._replace(
        peak=torch.where(total.isnan(), torch.nan, peak),
        tops=torch.where(equal, tops, 0).sum(dim=0),
        rest=torch.where(equal, rest, weights).sum(dim=0),
        slope=slopes.sum(dim=0),
        spread=(factor * spreads + apart).sum(dim=0),
        above=counts[0].sum(dim=0),
        top=torch.where(equal, counts[1], LAST).amin(dim=0).long() + first,
    )


def _largest(
    head: Head, targets: Tensor, target_logit: Tensor, scale: float, softcap: float | None, topk: int, backend: str
) -> tuple[Tensor, Tensor]:
    """The ``topk`` largest logits (or all words, where there are fewer) and their indices, ties by index.

    A key is the logit as an integer of the same order, then the index from the end: no two are equal, so that the
    order of the selection does not depend on how torch breaks ties.
    """
    tokens, words = len(head.hidden), len(head.weight)
    tall = min(tokens, 1024)
    wide = SEARCHED // tall
    tile = target_logit.new_empty(tall * min(wide, words))
    found = []
    for rows in pieces(tokens, tall):
        best = targets.new_empty((rows.stop - rows.start, 0))
        for columns in pieces(words, wide):
            part = head.part(rows, columns)
            shape = len(part.hidden), len(part.weight)
            z = tile[: shape[0] * shape[1]].view(shape)
            here, logit = (targets[rows] - columns.start).contiguous(), target_logit[rows]
            _launch(backend, LOGITS, part, scale, softcap, targets=here, logit=logit, out=z)
            bits = z.add_(0.0).view(torch.int32)  # -0 becomes 0
            order = (bits ^ ((bits >> 31) & LAST)).long()
            indices = torch.arange(columns.start, columns.stop, device=z.device)
            keys = torch.cat([best, (order << 32) | (LAST - indices)], dim=1)
            best = keys.topk(min(topk, keys.shape[1]), dim=1).values
        found.append(best)
    keys = torch.cat(found)
    order = (keys >> 32).int()
    return (order ^ ((order >> 31) & LAST)).view(torch.float32), LAST - (keys & 0xFFFFFFFF)


def logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    remainder: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_logprob_backward``."""
    sums = torch.stack([logsumexp, remainder], dim=1)
    return _backward(grad, (hidden, weight, bias), None, targets, sums, None, softcap, scale, needs, backend)


def kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of ``torch.ops.cwfast.lm_token_kl``."""
    model, reference = _head(hidden, weight, bias, backend), _head(ref_hidden, ref_weight, ref_bias, backend)
    tokens = len(hidden)
    chunks, chunk = chunks_of(tokens, len(weight), hidden.device)
    partial = torch.empty(
        (5, chunks * (2 if backend == "cuda" else 1), tokens), dtype=torch.float32, device=hidden.device
    )
    _launch(
        backend, KL, model, scale, softcap, reference=reference, chunks=chunks, chunk=chunk, partial=partial
    )
    *both, gaps = partial.double()
    log_sums, good = [], []
    for peaks, sums in (both[:2], both[2:]):
        peak = peaks.amax(dim=0)
        weights = torch.where(peaks == -torch.inf, 0, (peaks - peak).exp() * sums)
        total = weights.sum(dim=0)
        log_sums.append(peak + total.log())
        good.append(log_sums[-1].isfinite())
    gap = torch.where(weights > 0, weights * gaps, 0).sum(dim=0) / total
    divergence = (gap - (log_sums[1] - log_sums[0])).clamp(min=0)
    rounded = [exact.float() for exact in log_sums]
    model_sums, ref_sums = (
        torch.stack([near, (exact - near.double()).float()], dim=1)
        for near, exact in zip(rounded, log_sums, strict=True)
    )
    return torch.where(good[0] & good[1], divergence, torch.nan).float(), model_sums, ref_sums


def kl_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    logsumexp: Tensor,
    ref_logsumexp: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    scale: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_token_kl_backward``."""
    model, reference = (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)
    return _backward(grad, model, reference, None, logsumexp, ref_logsumexp, softcap, scale, needs, backend)


def _backward(
    grad: Tensor,
    model: tuple[Tensor, Tensor, Tensor | None],
    reference: tuple[Tensor, Tensor, Tensor | None] | None,
    targets: Tensor | None,
    sums: Tensor,
    ref_sums: Tensor | None,
    softcap: float | None,
    scale: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients at hidden, weight and bias, empty where not needed.

    The kernel writes a tile of the loss's gradient at ``hidden weight^T + bias``, of at most WORKSPACE bytes in the
    dtype of hidden; torch multiplies it. The vocabulary is the outer loop; what several tiles add to is float32.
    """
    hidden, weight, bias = model
    head = _head(*model, backend)
    theirs = None if reference is None else _head(*reference, backend)
    grad, sums = grad.float().contiguous(), sums.contiguous()
    nothing = hidden.new_empty(0)
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needs[0] else nothing
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else nothing
    grad_bias = torch.empty_like(bias) if bias is not None and needs[2] else nothing
    cells = WORKSPACE // hidden.element_size()
    tall = min(len(hidden), cells // 1024) or 1
    wide = cells // tall
    tile = head.hidden.new_empty(tall * min(wide, len(weight)))
    once = tall >= len(hidden)
    for columns in pieces(len(weight), wide):
        words = columns.stop - columns.start
        sum_weight = None if once or not needs[1] else torch.zeros_like(weight[columns], dtype=torch.float32)
        sum_bias = torch.zeros(words, dtype=torch.float32, device=weight.device)
        for rows in pieces(len(hidden), tall):
            part = head.part(rows, columns)
            dz = tile[: len(part.hidden) * words].view(-1, words)
            _launch(
                backend,
                LOGPROB_GRAD if targets is not None else KL_GRAD,
                part,
                scale,
                softcap,
                reference=None if theirs is None else theirs.part(rows, columns),
                targets=None if targets is None else (targets[rows] - columns.start).contiguous(),
                out=dz,
                grad=grad[rows],
                logsumexp=sums[rows],
                ref_logsumexp=None if ref_sums is None else ref_sums[rows],
            )
            if needs[0]:
                grad_hidden[rows] += dz @ part.weight
            if needs[1] and once:
                torch.mm(dz.T, part.hidden, out=grad_weight[columns])
            elif sum_weight is not None:
                sum_weight += dz.T @ part.hidden
            if bias is not None and needs[2]:
                sum_bias += dz.sum(dim=0, dtype=torch.float32)
        if sum_weight is not None:
            grad_weight[columns] = sum_weight
        if bias is not None and needs[2]:
            grad_bias[columns] = sum_bias
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias
