"""out[v,d] += scale * |factor[v,d]|^p * sum_b |sum_{t: token[b,t] = v} grad[b,t,d]|^p, p 1 or 2.

Reference: ``cwfast.reference.accumulate_embedding_saliency_``. Called by ``cwfast.ops.embedding_saliency`` (backend
"triton"). Moves each row of grad once, and 8 bytes of out and the factor for each entry of a token that occurs: nothing
by the size of the vocabulary. Rows are sorted by (token, sample); one program owns some columns of one token and walks
its samples in order: no atomics, the same bits on every run. Not yet run on a GPU.
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
    scale: tl.float64,
    columns,  # D
    out_row,  # strides, in entries
    out_col,
    grad_row,
    grad_col,
    factor_row,
    factor_col,
    POWER: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    which = tl.program_id(0)
    token = tl.load(tokens + which)
    d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    t = tl.arange(0, BT)
    inside = d < columns
    total = tl.zeros((BD,), out.dtype.element_ty)
    for segment in range(tl.load(firsts + which), tl.load(firsts + which + 1)):
        begin = tl.load(segments + segment)
        end = tl.load(segments + segment + 1)
        acc = tl.zeros((BD,), out.dtype.element_ty)
        for at in range(begin, end, BT):
            mine = t < end - at
            row = tl.load(order + at + t, mask=mine, other=0)
            mask = mine[:, None] & inside[None, :]
            grad = tl.load(grad_outputs + row[:, None] * grad_row + d[None, :] * grad_col, mask=mask, other=0.0)
            acc += tl.sum(grad.to(out.dtype.element_ty), axis=0)
        total += tl.abs(acc) if POWER == 1 else acc * acc
    total *= scale  # a scalar takes the vector's type
    if HAS_FACTOR:
        w = tl.load(factor + token * factor_row + d * factor_col, mask=inside, other=0.0).to(out.dtype.element_ty)
        total *= tl.abs(w) if POWER == 1 else w * w
    place = out + token * out_row + d * out_col
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


BD, BT, WARPS = 128, 4, 4  # 512 bytes of a float32 row at once; most tokens occur a few times in a sample


def accumulate_embedding_saliency_(
    out: Tensor,
    owner: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
) -> None:
    """Launch; arguments as of ``cwfast.reference.accumulate_embedding_saliency_``."""
    if not len(indices) or not out.numel():
        return
    order = indices.argsort(stable=True)
    token, sample = indices[order], owner[order]  # owner ascends, so that it still does within a token
    new_token = torch.ones_like(token, dtype=torch.bool)
    new_token[1:] = token[1:] != token[:-1]
    new_segment = new_token.clone()
    new_segment[1:] |= sample[1:] != sample[:-1]
    segments = new_segment.nonzero()[:, 0]
    firsts = new_token[segments].nonzero()[:, 0]
    tokens = token[segments[firsts]]
    segments = torch.cat([segments, segments.new_tensor([len(token)])])
    firsts = torch.cat([firsts, firsts.new_tensor([len(segments) - 1])])
    weight = out if factor is None else factor
    columns = out.shape[1]
    _embedding_saliency_kernel[(len(tokens), triton.cdiv(columns, BD))](
        out,
        grad_outputs,
        order,
        segments,
        firsts,
        tokens,
        weight,
        scale,
        columns,
        out.stride(0),
        out.stride(1),
        grad_outputs.stride(0),
        grad_outputs.stride(1),
        weight.stride(0),
        weight.stride(1),
        POWER=power,
        HAS_FACTOR=factor is not None,
        BD=BD,
        BT=BT,
        num_warps=WARPS,
    )
