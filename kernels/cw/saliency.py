"""S[o,i] += scale * |factor[o,i]|^p * sum_b |sum_t D[b,t,o] * A[b,t,i]|^p, p 1 or 2; if asked grad += sum_b sum_t D A.

Reference: ``cwfast.reference.accumulate_saliency_``. Called by ``cwfast.ops.saliency`` (backend "triton").
Moves per entry of S: 8 bytes of S, the factor once, 8 bytes of grad; each row of A and D once per tile of the other.
A matrix product of the weight-gradient kind whose accumulator is folded into a second register tile after each
sample (a third if grad is asked for). One loop runs over the blocks of rows of all samples, so that the loads of the
next sample are under way while this one is folded. One program owns one tile of S: no atomics, the same bits on every
run. A layer with few tiles is shared out by samples too, each share into a workspace. Not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from cwfast.kernels._tl import quarters
from torch import Tensor


@triton.jit
def _saliency_kernel(
    out,  # [O, I] float32 or float64, contiguous; [shares, O, I] where samples are shared out
    inputs,  # [rows, input_columns], at least I; entries of a row are adjacent
    grad_outputs,  # [rows, grad_output_columns], at least O; likewise
    blocks,  # [blocks + 1] int64: twice the row at which a block of rows begins, and 1 if a sample begins there
    shares,  # [shares + 1] int64: the block at which a share begins
    factor,  # [O, I] any float; not read without HAS_FACTOR
    grad,  # of the shape and dtype of out; not touched without HAS_GRAD
    scale: tl.float64,
    n_out,  # O
    n_in,  # I
    input_columns,
    grad_output_columns,
    input_row,  # strides, in entries
    grad_output_row,
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
    TYPE: tl.constexpr = out.dtype.element_ty
    # Tiles in columns of GROUP, so that programs that run together share rows of A and D in the cache.
    tile = tl.program_id(0)
    across = tl.cdiv(n_in, BI)
    first = tile // (GROUP * across) * GROUP
    height = min(tl.cdiv(n_out, BO) - first, GROUP)
    top = (first + tile % (GROUP * across) % height).to(tl.int64) * BO
    left = (tile % (GROUP * across) // height).to(tl.int64) * BI
    # 64 bits find the tile; the offsets inside are 32 wide where that is enough, which saves registers.
    o, i, t = tl.arange(0, BO).to(OFFSET), tl.arange(0, BI).to(OFFSET), tl.arange(0, BT)
    read_o = o < tl.minimum(grad_output_columns - top, BO).to(OFFSET)
    read_i = i < tl.minimum(input_columns - left, BI).to(OFFSET)
    # D is addressed as its transpose: a transposed load would go through registers on the way to shared memory.
    d_tile = o[:, None] + t[None, :].to(OFFSET) * grad_output_row
    a_tile = t[:, None].to(OFFSET) * input_row + i[None, :]

    acc = tl.zeros((BO, BI), TYPE)
    total = tl.zeros((BO, BI), TYPE)
    if HAS_GRAD:
        plain = tl.zeros((BO, BI), TYPE)
    share = tl.program_id(1).to(tl.int64)
    for block in range(tl.load(shares + share), tl.load(shares + share + 1)):
        row = tl.load(blocks + block) >> 1
        after = tl.load(blocks + block + 1)
        inside = t < ((after >> 1) - row).to(tl.int32)
        d_base = grad_outputs + row * grad_output_row + top
        a_base = inputs + row * input_row + left
        d = tl.load(d_base + d_tile, read_o[:, None] & inside[None, :], other=0.0)
        a = tl.load(a_base + a_tile, inside[:, None] & read_i[None, :], other=0.0)
        if ONE_ROW and POWER == 1:
            d, a = tl.abs(d), tl.abs(a)
        if ONE_ROW and POWER == 2:  # the square of a 16-bit float needs more than 16 bits
            d, a = d.to(TYPE), a.to(TYPE)
            d, a = d * d, a * a
        acc = tl.dot(d, a, acc, input_precision="ieee", out_dtype=TYPE)
        if not ONE_ROW:  # noqa: SIM102 - the first is decided by the compiler
            if (after & 1) != 0:  # the sample ends here
                if POWER == 1:
                    total += tl.abs(acc)
                else:
                    total += acc * acc
                if HAS_GRAD:
                    plain += acc
                acc = tl.zeros((BO, BI), TYPE)
    if ONE_ROW:
        total = acc

    # By quarters, with barriers: or the registers of all the loads are wanted at once.
    STRIP: tl.constexpr = BI // 4
    i = tl.arange(0, STRIP).to(OFFSET)
    in_o = o < tl.minimum(n_out - top, BO).to(OFFSET)
    at = o[:, None] * n_in + i[None, :]
    corner = (share * n_out + top) * n_in + left
    if HAS_GRAD:
        plains = quarters(plain, BO, BI)
        for part in tl.static_range(4):
            mask = in_o[:, None] & (i < tl.minimum(n_in - left - part * STRIP, STRIP).to(OFFSET))[None, :]
            grad_tile = grad + corner + part * STRIP + at
            tl.store(grad_tile, tl.load(grad_tile, mask, other=0.0) + plains[part], mask)
            tl.debug_barrier()
    totals = quarters(total, BO, BI)
    for part in tl.static_range(4):
        mask = in_o[:, None] & (i < tl.minimum(n_in - left - part * STRIP, STRIP).to(OFFSET))[None, :]
        sums = totals[part] * tl.full((1, 1), scale, TYPE)
        if HAS_FACTOR:
            factor_base = factor + top * factor_row + (left + part * STRIP) * factor_col
            w = tl.load(factor_base + o[:, None] * factor_row + i[None, :] * factor_col, mask, other=0.0).to(TYPE)
            if POWER == 1:
                sums *= tl.abs(w)
            else:
                sums *= w * w
        out_tile = out + corner + part * STRIP + at
        tl.store(out_tile, tl.load(out_tile, mask, other=0.0) + sums, mask)
        tl.debug_barrier()


GROUP = 8
WIDE = 16  # entries: Triton is told of sizes that are multiples of this, and then loads 16 bytes at a time
SHORT = 32  # rows of a sample on average: blocks of 64 rows would be half empty
MOST_SHARES = 8
WORKSPACE_BYTES = 64 << 20
MULTIPROCESSORS = 4  # taken for those of the interpreter


def tiles(dtype: torch.dtype, one_row: bool, power: int, short: bool, hip: bool) -> dict[str, int]:
    """BO, BI, BT, num_warps and num_stages for inputs of this dtype.

    16-bit inputs: two or three tiles of 128 x 128 in the registers of 8 warps, on tensor cores; 128 x 256 spills.
    float32 products without loss of bits run on the ordinary cores, whose operands stay in registers: smaller tiles.
    5 stages are 3 of rows, because the offsets of a block are on their way two stages before its rows; AMD's compiler
    keeps stages in registers, where there is room for 2.
    """
    if dtype == torch.float64:
        return {"BO": 32, "BI": 32, "BT": 16, "num_warps": 4, "num_stages": 3}
    if dtype == torch.float32 or (one_row and power == 2):
        return {"BO": 64, "BI": 64, "BT": 16, "num_warps": 8, "num_stages": 3}
    return {"BO": 128, "BI": 128, "BT": 32 if short else 64, "num_warps": 8, "num_stages": 2 if hip else 5}


def blocks_of(row_offsets: Tensor, rows: int, shares: int) -> tuple[Tensor, Tensor]:
    """The blocks of at most ``rows`` rows and the shares of samples, as ``_saliency_kernel`` takes them.

    Args:
        row_offsets: int64 ``[samples + 1]``, CPU.
        rows: BT.
        shares: 1 to the number of samples.
    """
    each = (row_offsets.diff() + rows - 1) // rows
    first = torch.zeros_like(row_offsets)
    torch.cumsum(each, 0, out=first[1:])
    sample = torch.repeat_interleave(torch.arange(len(each)), each)
    index = torch.arange(len(sample)) - first[sample]
    begin = 2 * (row_offsets[sample] + index * rows) + (index == 0)
    blocks = torch.cat([begin, 2 * row_offsets[-1:] + 1])
    return blocks, first[torch.arange(shares + 1) * len(each) // shares]


def shares_of(samples: int, tiles: int, tile_bytes: int, multiprocessors: int) -> int:
    """Into how many shares to divide the samples: as many as the multiprocessors can take at once."""
    return max(1, min(MOST_SHARES, samples, multiprocessors // tiles, WORKSPACE_BYTES // (tiles * tile_bytes)))


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
    """Launch; arguments as of ``cwfast.reference.accumulate_saliency_``, ``row_offsets`` on the CPU.

    ``one_row``: every sample has exactly one row.
    """
    if out.numel() == 0 or len(inputs) == 0:
        return
    inputs, grad_outputs = _wide_rows(inputs), _wide_rows(grad_outputs)
    if not one_row:
        _launch(out, inputs, grad_outputs, row_offsets, power, scale, factor, grad, False)
        return
    # One product over all rows, and the gradient is another. A block is a sample: shares may begin at every block.
    _launch(out, inputs, grad_outputs, row_offsets, power, scale, factor, None, True)
    if grad is not None:
        _launch(grad, inputs, grad_outputs, row_offsets, 0, 1.0, None, None, True)


def _wide_rows(rows: Tensor) -> Tensor:
    """Rows that can be read 16 bytes at a time: copied, with zeros behind each row, where they cannot.

    Without that every entry of a 16-bit type is a load of its own, through registers that the tiles need.
    """
    if rows.stride(1) == 1 and rows.data_ptr() % 16 == 0 and rows.stride(0) % WIDE == rows.shape[1] % WIDE == 0:
        return rows
    columns = triton.cdiv(rows.shape[1], WIDE) * WIDE
    wide = rows.new_zeros(len(rows), columns)
    wide[:, : rows.shape[1]] = rows
    return wide


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
    short = not one_row and len(inputs) <= SHORT * (len(row_offsets) - 1)
    config = tiles(inputs.dtype, one_row, power, short, torch.version.hip is not None)
    if one_row:
        step = config["BT"]
        row_offsets = torch.arange(0, len(inputs) + step, step).clamp(max=len(inputs))
    count = triton.cdiv(rows, config["BO"]) * triton.cdiv(columns, config["BI"])
    on_gpu = out.device.type == "cuda"
    have = torch.cuda.get_device_properties(out.device).multi_processor_count if on_gpu else MULTIPROCESSORS
    tile_bytes = config["BO"] * config["BI"] * out.element_size() * (1 if grad is None else 2)
    shares = shares_of(len(row_offsets) - 1, count, tile_bytes, have)
    sums = [out] if grad is None else [out, grad]
    written = sums if shares == 1 else [x.new_zeros(shares, *x.shape) for x in sums]
    blocks, first = (x.to(out.device) for x in blocks_of(row_offsets, config["BT"], shares))
    weight = out if factor is None else factor
    reach = max(config["BO"], config["BI"], config["BT"]) * max(
        sum(x.stride()) for x in (out, inputs, grad_outputs, weight)
    )
    _saliency_kernel[(count, shares)](
        written[0],
        inputs,
        grad_outputs,
        blocks,
        first,
        weight,
        written[-1],
        scale,
        rows,
        columns,
        inputs.shape[1],
        grad_outputs.shape[1],
        inputs.stride(0),
        grad_outputs.stride(0),
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
    if shares > 1:
        for target, parts in zip(sums, written, strict=True):
            for part in parts:  # in a fixed order
                target.add_(part)
