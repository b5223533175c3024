"""out[v,d] += scale * |factor[v,d]|^p * sum_b |G_b[v,d]|^p, grad[v,d] += sum_b G_b[v,d], p 1 or 2,
G_b[v] = sum_{t: token[b,t] = v} grad_outputs[b,t].

Reference: ``cwfast.reference.accumulate_embedding_saliency_``. Called by ``cwfast.ops._embedding_device`` (backend
"triton"). Moves each row of grad_outputs once, and 8 bytes of out and of grad and the factor for each entry of a token
that occurs: nothing by the size of the vocabulary. Rows are sorted by (token, sample); one program owns some columns of
one token and walks its samples in order: no atomics, the same bits on every run. Not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _embedding_saliency_kernel(
    out,  # [V, D] float32 or float64
    grad_outputs,  # [rows, D] any float
    order,  # [rows] int64: the rows by (token, sample)
    segments,  # [segments + 1] int64: where in order the rows of each (token, sample) begin
    firsts,  # [tokens + 1] int64: the first segment of each token that occurs
    tokens,  # [tokens] int64: which these are
    factor,  # [V, D] any float; not read without HAS_FACTOR
    grad,  # [V, D] as out; not touched without HAS_GRAD
    scale: tl.float64,
    columns,  # D
    out_row,  # strides, in entries
    out_col,
    rows_row,
    rows_col,
    factor_row,
    factor_col,
    grad_row,
    grad_col,
    POWER: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    which = tl.program_id(0)
    token = tl.load(tokens + which)
    d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    t = tl.arange(0, BT)
    inside = d < columns
    total = tl.zeros((BD,), out.dtype.element_ty)
    every = tl.zeros((BD,), out.dtype.element_ty)
    for segment in range(tl.load(firsts + which), tl.load(firsts + which + 1)):
        begin = tl.load(segments + segment)
        end = tl.load(segments + segment + 1)
        acc = tl.zeros((BD,), out.dtype.element_ty)
        for at in range(begin, end, BT):
            mine = t < end - at
            row = tl.load(order + at + t, mask=mine, other=0)
            mask = mine[:, None] & inside[None, :]
            g = tl.load(grad_outputs + row[:, None] * rows_row + d[None, :] * rows_col, mask=mask, other=0.0)
            acc += tl.sum(g.to(out.dtype.element_ty), axis=0)
        total += tl.abs(acc) if POWER == 1 else acc * acc
        if HAS_GRAD:
            every += acc
    total *= scale  # a scalar takes the vector's type
    if HAS_FACTOR:
        w = tl.load(factor + token * factor_row + d * factor_col, mask=inside, other=0.0).to(out.dtype.element_ty)
        total *= tl.abs(w) if POWER == 1 else w * w
    place = out + token * out_row + d * out_col
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)
    if HAS_GRAD:
        place = grad + token * grad_row + d * grad_col
        tl.store(place, tl.load(place, mask=inside, other=0.0) + every, mask=inside)


BD, BT, WARPS = 128, 4, 4  # 512 bytes of a float32 row at once; most tokens occur a few times in a sample


def accumulate_embedding_saliency_(
    out: Tensor,
    order: Tensor,
    samples: Tensor,
    tokens: Tensor,
    firsts: Tensor,
    grad_outputs: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    grad: Tensor | None,
) -> None:
    """Launch; ``order`` to ``firsts`` as ``cwfast.ops._embedding_device.Rows``, one row at least."""
    new = torch.ones_like(samples, dtype=torch.bool)
    new[1:] = samples[1:] != samples[:-1]
    new[firsts[:-1]] = True  # also where the samples of two tokens are the same
    segments = torch.cat([new.nonzero()[:, 0], firsts[-1:]])
    weight, sums = (out if x is None else x for x in (factor, grad))
    columns = out.shape[1]
    _embedding_saliency_kernel[(len(tokens), triton.cdiv(columns, BD))](
        out,
        grad_outputs,
        order,
        segments,
        torch.searchsorted(segments, firsts),
        tokens,
        weight,
        sums,
        scale,
        columns,
        *out.stride(),
        *grad_outputs.stride(),
        *weight.stride(),
        *sums.stride(),
        POWER=power,
        HAS_FACTOR=factor is not None,
        HAS_GRAD=grad is not None,
        BD=BD,
        BT=BT,
        num_warps=WARPS,
    )
