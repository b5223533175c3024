"""lm_token_stats and lm_token_kl on devices: launches for triton and cuda, and what their chunks of the vocabulary say.

A kernel folds the logits of a chunk into a few numbers per token; the chunks are merged here, in float64. The
backward passes compute tiles of the loss's gradient at the logits into a workspace, and torch multiplies them; topk is
a second pass over the vocabulary, whose tiles of logits torch searches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cwfast import _backends
from cwfast.errors import BackendUnavailable
from cwfast.ops._lm_token_parts import Parts, finish, no_parts, split
from cwfast.ops._lm_token_tiles import pieces
from cwfast.reference import LMHead

TARGET, STATS, KL, LOGITS, LOGPROB_GRAD, KL_GRAD = range(6)  # CwfastLmTask of csrc/cuda/launchers.h
TILE = 128  # tokens, words: of a kernel, or a multiple of it
PROGRAMS = 8  # for each multiprocessor: the last ones to end keep few of them waiting
WORKSPACE = 64 << 20  # bytes of a tile of gradients
SEARCHED = 2 << 20  # logits of which topk sorts keys at once: 24 bytes each
LAST = 2**31 - 1


class Heads(NamedTuple):
    """Hidden states and the LM head above them, as the kernels read them: adjacent entries, bias float32."""

    hidden: Tensor
    head: LMHead

    def part(self, rows: slice, columns: slice) -> "Heads":
        bias = None if self.head.bias is None else self.head.bias[columns]
        return Heads(self.hidden[rows], self.head._replace(weight=self.head.weight[columns], bias=bias))


def _readable(hidden: Tensor, head: LMHead, backend: str) -> Heads:
    """Rows whose entries are not adjacent are copied."""
    if hidden.dtype not in _backends.CUDA_DTYPES:
        raise BackendUnavailable(
            f"backend {backend!r} runs lm_token_stats and lm_token_kl in {_backends.CUDA_DTYPES}; got {hidden.dtype}: "
            "use 'reference'"
        )
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, head.weight))
    return Heads(
        hidden, head._replace(weight=weight, bias=None if head.bias is None else head.bias.float().contiguous())
    )


def _launch(
    backend: str,
    task: int,
    model: Heads,
    *,
    reference: Heads | None = None,
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
    """One task; the arguments are those of CwfastLmTokens in csrc/cuda/launchers.h."""
    hidden, head = model
    if len(hidden) == 0:
        return
    tensors = {"targets": targets, "logit": logit, "partial": partial, "counts": counts, "out": out, "grad": grad}
    tensors |= {"logsumexp": logsumexp, "ref_logsumexp": ref_logsumexp}
    if backend == "triton":
        kernels = _backends.triton_kernels("lm_token_stats")
        kernels.launch(task, model, reference, head.scale, head.softcap, chunks, chunk, **tensors)
        return
    address = {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}

    def fields(x: Heads | None) -> tuple[int, ...]:
        if x is None:
            return (0,) * 6
        bias = 0 if x.head.bias is None else x.head.bias.data_ptr()
        strides = x.hidden.stride(0), x.head.weight.stride(0)
        return x.hidden.data_ptr(), x.head.weight.data_ptr(), bias, *strides, x.hidden.shape[1]

    _backends.native().cuda_lm_tokens(
        task,
        fields(model),
        fields(reference),
        len(hidden),
        len(head.weight),
        _backends.cuda_dtype("lm_token_stats", hidden.dtype),
        head.scale,
        head.softcap or 0.0,
        address["targets"],
        address["logit"],
        chunks,
        chunk,
        address["partial"],
        address["counts"],
        address["out"],
        address["grad"],
        address["logsumexp"],
        address["ref_logsumexp"],
        hidden.device.index or 0,
        _backends.cuda_stream(hidden.device),
    )


def chunks_of(tokens: int, words: int, device: torch.device) -> tuple[int, int]:
    """How many chunks the words are taken in, and how many words one has, a multiple of TILE."""
    cuda = device.type == "cuda"
    have = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    tiles = -(-words // TILE)
    each = -(-tiles // max(1, min(tiles, -(-PROGRAMS * have // max(1, -(-tokens // TILE))))))
    return -(-tiles // max(1, each)), each * TILE


def stats(hidden: Tensor, head: LMHead, targets: Tensor, topk: int, backend: str) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_token_stats``."""
    logit = target_logits(hidden, head, targets, 0, backend)
    return finish(parts_of(hidden, head, targets, logit, topk, 0, len(head.weight), backend), logit, targets)


def target_logits(hidden: Tensor, head: LMHead, targets: Tensor, first: int, backend: str) -> Tensor:
    """``[N]`` float32; -inf for targets outside of the tokens ``first ...`` that the head has."""
    model = _readable(hidden, head, backend)
    out = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    _launch(backend, TARGET, model, targets=(targets - first).contiguous(), logit=out)
    return out


def parts_of(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    target_logit: Tensor,
    topk: int,
    first: int,
    vocabulary: int,
    backend: str,
) -> Parts:
    """Of the tokens ``first ...`` that the head has, of ``vocabulary`` in all."""
    model = _readable(hidden, head, backend)
    targets, target_logit = (targets - first).contiguous(), target_logit.contiguous()
    tokens, words = len(hidden), len(head.weight)
    parts = no_parts(target_logit, vocabulary, topk)
    if tokens == 0 or words == 0:
        return parts
    chunks, chunk, partial = _workspace(tokens, words, target_logit, backend)
    counts = torch.empty((2, *partial.shape[1:]), dtype=torch.int32, device=partial.device)
    _launch(
        backend,
        STATS,
        model,
        chunks=chunks,
        chunk=chunk,
        targets=targets,
        logit=target_logit,
        partial=partial,
        counts=counts,
    )
    parts = _joined(partial.double(), counts, first, parts)
    if topk:
        values, indices = _largest(model, targets, target_logit, topk, backend)
        count = values.shape[1]
        parts.values[:, :count], parts.indices[:, :count] = values, indices + first
    return parts


def _workspace(tokens: int, words: int, like: Tensor, backend: str) -> tuple[int, int, Tensor]:
    """Chunks, words of one, and what the kernel writes of each: cuda shares a chunk between two threads."""
    chunks, chunk = chunks_of(tokens, words, like.device)
    entries = chunks * (2 if backend == "cuda" else 1)
    return chunks, chunk, torch.empty((5, entries, tokens), dtype=torch.float32, device=like.device)


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


def _largest(model: Heads, targets: Tensor, target_logit: Tensor, topk: int, backend: str) -> tuple[Tensor, Tensor]:
    """The ``topk`` largest logits (or all words, where there are fewer) and their indices, ties by index.

    A key is the logit as an integer of the same order, then the index from the end: no two are equal, so that the
    order of the selection does not depend on how torch breaks ties.
    """
    tokens, words = len(model.hidden), len(model.head.weight)
    tall = min(tokens, 1024)
    wide = SEARCHED // tall
    tile = target_logit.new_empty(tall * min(wide, words))
    found = []
    for rows in pieces(tokens, tall):
        best = targets.new_empty((rows.stop - rows.start, 0))
        for columns in pieces(words, wide):
            part = model.part(rows, columns)
            shape = len(part.hidden), len(part.head.weight)
            z = tile[: shape[0] * shape[1]].view(shape)
            here, logit = (targets[rows] - columns.start).contiguous(), target_logit[rows]
            _launch(backend, LOGITS, part, targets=here, logit=logit, out=z)
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
    grad: Tensor, sums: Tensor, hidden: Tensor, head: LMHead, targets: Tensor, needs: Sequence[bool], backend: str
) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_logprob_backward``."""
    return _backward(grad, sums, None, hidden, head, None, targets, needs, backend)


def kl(
    hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of ``torch.ops.cwfast.lm_token_kl``."""
    model, reference = _readable(hidden, head, backend), _readable(ref_hidden, ref_head, backend)
    chunks, chunk, partial = _workspace(len(hidden), len(head.weight), hidden, backend)
    _launch(backend, KL, model, reference=reference, chunks=chunks, chunk=chunk, partial=partial)
    peaks, sums, ref_peaks, ref_sums, gaps = partial.double()
    peak, shifts, _, total = _rescaled(peaks, sums)
    ref_peak, ref_shifts, weights, ref_total = _rescaled(ref_peaks, ref_sums)
    gap = torch.where(weights > 0, weights * (gaps + (ref_shifts - shifts)), 0).sum(dim=0) / ref_total
    divergence = gap + (total.log() - ref_total.log())
    log_sums = peak + total.log(), ref_peak + ref_total.log()
    good = log_sums[0].isfinite() & log_sums[1].isfinite()
    divergence = torch.where(good, divergence.clamp(min=0), torch.nan).float()
    return divergence, split(log_sums[0], torch.float32), split(log_sums[1], torch.float32)


def _rescaled(peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of chunks: the largest peak, how far below it each lies (0 for none), sums relative to it, and their total."""
    peak = peaks.amax(dim=0)
    shifts = torch.where(peaks == -torch.inf, 0, peaks - peak)
    weights = torch.where(peaks == -torch.inf, 0, shifts.exp() * sums)
    return peak, shifts, weights, weights.sum(dim=0)


def kl_backward(
    grad: Tensor,
    sums: Tensor,
    ref_sums: Tensor,
    hidden: Tensor,
    head: LMHead,
    ref_hidden: Tensor,
    ref_head: LMHead,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    """The results of ``torch.ops.cwfast.lm_token_kl_backward``."""
    reference = _readable(ref_hidden, ref_head, backend)
    return _backward(grad, sums, ref_sums, hidden, head, reference, None, needs, backend)


def _backward(
    grad: Tensor,
    sums: Tensor,
    ref_sums: Tensor | None,
    hidden: Tensor,
    head: LMHead,
    reference: Heads | None,
    targets: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients at hidden, weight and bias, empty where not needed.

    The kernel writes a tile of the loss's gradient at ``hidden weight^T + bias``, of at most WORKSPACE bytes in the
    dtype of hidden; torch multiplies it. The vocabulary is the outer loop; what several tiles add to is float32.
    """
    model = _readable(hidden, head, backend)
    weight, bias = head.weight, head.bias
    grad, sums = grad.float().contiguous(), sums.contiguous()
    ref_sums = None if ref_sums is None else ref_sums.contiguous()
    nothing = hidden.new_empty(0)
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needs[0] else nothing
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else nothing
    grad_bias = torch.empty_like(bias) if bias is not None and needs[2] else nothing
    cells = WORKSPACE // hidden.element_size()
    tall = min(len(hidden), cells // 1024) or 1
    wide = cells // tall
    tile = model.hidden.new_empty(tall * min(wide, len(weight)))
    once = tall >= len(hidden)
    for columns in pieces(len(weight), wide):
        words = columns.stop - columns.start
        sum_weight = None if once or not needs[1] else torch.zeros_like(weight[columns], dtype=torch.float32)
        sum_bias = torch.zeros(words, dtype=torch.float32, device=weight.device)
        for rows in pieces(len(hidden), tall):
            part = model.part(rows, columns)
            dz = tile[: len(part.hidden) * words].view(-1, words)
            _launch(
                backend,
                LOGPROB_GRAD if targets is not None else KL_GRAD,
                part,
                reference=None if reference is None else reference.part(rows, columns),
                targets=None if targets is None else (targets[rows] - columns.start).contiguous(),
                out=dz,
                grad=grad[rows],
                logsumexp=sums[rows],
                ref_logsumexp=None if ref_sums is None else ref_sums[rows],
            )
            if needs[0]:
                grad_hidden[rows] += dz @ part.head.weight
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
