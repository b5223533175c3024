"""S[o,i] += scale * |factor[o,i]|^p * sum_b |sum_t D[b,t,o] * A[b,t,i]|^p, p 1 or 2; if asked grad += sum_b sum_t D A.

Reference: ``cwfast.reference.accumulate_saliency_``. Called by ``cwfast.ops.saliency`` (backend "triton").
Moves per entry of S: 8 bytes of S, the factor once, 8 bytes of grad; each row of A and D once per tile of the other.
A matrix product of the weight-gradient kind whose accumulator is folded into a second register tile after each
sample. One program owns one tile of S: no atomics, the same bits on every run. Not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _saliency_kernel(
    out,  # [O, I] float32 or float64, contiguous
    inputs,  # [rows, I]
    grad_outputs,  # [rows, O]
    row_offsets,  # [samples + 1] int64
    factor,  # [O, I] any float; not read without HAS_FACTOR
    grad,  # [O, I] of the dtype of out; not touched without HAS_GRAD
    scale: tl.float64,
    samples,
    n_out,  # O
    n_in,  # I
    input_row,  # strides, in entries
    input_col,
    grad_output_row,
    grad_output_col,
    factor_row,
    factor_col,
    POWER: tl.constexpr,  # 0: the plain sum, only with ONE_ROW
    ONE_ROW: tl.constexpr,  # every sample has one row: one product of |.| or squares over all rows
    HAS_FACTOR: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,  # tl.int32, or tl.int64 where a tile reaches further
):
    # Tiles in columns of GROUP, so that programs that run together share rows of A and D in the cache.
    tile = tl.program_id(0)
    across = tl.cdiv(n_in, BI)
    first = tile // (GROUP * across) * GROUP
    height = min(tl.cdiv(n_out, BO) - first, GROUP)
    top = (first + tile % (GROUP * across) % height).to(tl.int64) * BO
    left = (tile % (GROUP * across) // height).to(tl.int64) * BI
    # 64 bits find the tile; the offsets inside are 32 wide where that is enough, which saves registers.
    o, i, t = tl.arange(0, BO).to(OFFSET), tl.arange(0, BI).to(OFFSET), tl.arange(0, BT).to(OFFSET)
    in_o, in_i = o < n_out - top, i < n_in - left
    d_tile = t[:, None] * grad_output_row + o[None, :] * grad_output_col
    a_tile = t[:, None] * input_row + i[None, :] * input_col

    total = tl.zeros((BO, BI), out.dtype.element_ty)
    if HAS_GRAD:
        plain = tl.zeros((BO, BI), out.dtype.element_ty)
    for b in range(samples):
        begin = tl.load(row_offsets + b)
        end = tl.load(row_offsets + b + 1)
        acc = tl.zeros((BO, BI), out.dtype.element_ty)
        for row in range(begin, end, BT):
            inside = t < end - row  # the rows behind belong to the next sample
            d_base = grad_outputs + row * grad_output_row + top * grad_output_col
            a_base = inputs + row * input_row + left * input_col
            d = tl.load(d_base + d_tile, inside[:, None] & in_o[None, :], other=0.0)
            a = tl.load(a_base + a_tile, inside[:, None] & in_i[None, :], other=0.0)
            if ONE_ROW and POWER == 1:
                d, a = tl.abs(d), tl.abs(a)
            if ONE_ROW and POWER == 2:  # the square of a 16-bit float needs more than 16 bits
                d, a = d.to(out.dtype.element_ty), a.to(out.dtype.element_ty)
                d, a = d * d, a * a
            acc = tl.dot(tl.trans(d), a, acc, input_precision="ieee", out_dtype=out.dtype.element_ty)
        if ONE_ROW:
            total += acc
        else:
            if POWER == 1:
                total += tl.abs(acc)
            else:
                total += acc * acc
            if HAS_GRAD:
                plain += acc

    mask = in_o[:, None] & in_i[None, :]
    at = o[:, None] * n_in + i[None, :]
    if HAS_GRAD:
        grad_tile = grad + top * n_in + left + at
        tl.store(grad_tile, tl.load(grad_tile, mask, other=0.0) + plain, mask)
        tl.debug_barrier()  # or the loads of both halves are in registers at once
    total *= scale  # a scalar takes the tile's type
    if HAS_FACTOR:
        factor_tile = factor + top * factor_row + left * factor_col + o[:, None] * factor_row + i[None, :] * factor_col
        w = tl.load(factor_tile, mask, other=0.0).to(out.dtype.element_ty)
        if POWER == 1:
            total *= tl.abs(w)
        else:
            total *= w * w
        tl.debug_barrier()
    out_tile = out + top * n_in + left + at
    tl.store(out_tile, tl.load(out_tile, mask, other=0.0) + total, mask)


GROUP = 8


def tiles(dtype: torch.dtype, one_row: bool, power: int, has_grad: bool) -> dict[str, int]:
    """BO, BI, BT, num_warps and num_stages for inputs of this dtype.

    16-bit inputs: two tiles of 128 x 128 in the registers of 8 warps, on tensor cores; 128 x 256 spills. float32
    products without loss of bits run on the ordinary cores, whose operands stay in registers: smaller tiles.
    """
    if dtype == torch.float64:
        return {"BO": 32, "BI": 32, "BT": 16, "num_warps": 4, "num_stages": 2}
    if dtype == torch.float32 or (one_row and power == 2):
        return {"BO": 64, "BI": 64, "BT": 16, "num_warps": 8, "num_stages": 2}
    if has_grad:  # a third tile: 128 x 128 spills with ordinary pointers
        return {"BO": 128, "BI": 64, "BT": 32, "num_warps": 8, "num_stages": 3}
    return {"BO": 128, "BI": 128, "BT": 64, "num_warps": 8, "num_stages": 3}


def accumulate_saliency_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    row_offsets: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    grad: Tensor | None,
    one_row: bool,
) -> None:
    """Launch; arguments as of ``cwfast.reference.accumulate_saliency_``, and ``row_offsets`` on any device.

    ``one_row``: every sample has exactly one row.
    """
    if out.numel() == 0 or len(row_offsets) == 1:
        return
    if not one_row:
        _launch(out, inputs, grad_outputs, row_offsets, power, scale, factor, grad, False)
        return
    row_offsets = row_offsets[[0, -1]]  # one product over all rows; the gradient is another
    _launch(out, inputs, grad_outputs, row_offsets, power, scale, factor, None, True)
    if grad is not None:
        _launch(grad, inputs, grad_outputs, row_offsets, 0, 1.0, None, None, True)


def _launch(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    row_offsets: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    grad: Tensor | None,
    one_row: bool,
) -> None:
    rows, columns = out.shape
    config = tiles(inputs.dtype, one_row, power, grad is not None)
    grid = (triton.cdiv(rows, config["BO"]) * triton.cdiv(columns, config["BI"]),)
    weight = out if factor is None else factor
    reach = max(config["BO"], config["BI"], config["BT"]) * max(
        sum(x.stride()) for x in (out, inputs, grad_outputs, weight)
    )
    _saliency_kernel[grid](
        out,
        inputs,
        grad_outputs,
        row_offsets.to(out.device),
        weight,
        out if grad is None else grad,
        scale,
        len(row_offsets) - 1,
        rows,
        columns,
        inputs.stride(0),
        inputs.stride(1),
        grad_outputs.stride(0),
        grad_outputs.stride(1),
        weight.stride(0),
        weight.stride(1),
        POWER=power,
        ONE_ROW=one_row,
        HAS_FACTOR=factor is not None,
        HAS_GRAD=grad is not None,
        GROUP=GROUP,
        OFFSET=tl.int64 if reach > 2**31 - 1 else tl.int32,
        **config,
    )
