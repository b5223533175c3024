"""The k largest of all entries of a list of tensors, ties to the lowest (tensor, flat index), as packed bits.

Reference: ``cwfast.reference.select_topk``. Called by ``cwfast.ops.select`` (backend "triton"). Reads the scores once
for each 8 bits of their type (4 times for float32, 2 for 16-bit types) and once more to write 1/8 byte per entry.
A radix selection: each read counts the next digit of the keys that agree with the digits found so far, by chunk, so
that the last read knows how many ties each chunk may take. No atomics, no host in between. Not yet run on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from cwfast.kernels._tl import CHUNK, addresses, aligned, chunks_of, integer, pointer
from torch import Tensor

DIGIT = 8
BINS = 1 << DIGIT
BLOCK = 4096  # entries at a time: 16 for each thread of 8 warps
# Bits of infinity: the key of a number is at most this, that of NaN is larger.
INFINITY = {
    torch.float32: 0x7F80_0000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float64: 0x7FF0_0000_0000_0000,
}


class Found(NamedTuple):
    """What a selection gives. All on the device of the scores; to be thrown away where scores are not valid.

    Attributes:
        bits: uint8 per tensor.
        counts: int64 ``[tensors]``, selected entries.
        invalid: int64 ``[tensors, 2]``: NaN, negative.
        threshold: int64 ``[1]``, the bits of the smallest selected score.
    """

    bits: list[Tensor]
    counts: Tensor
    invalid: Tensor
    threshold: Tensor


@triton.jit
def _load_keys(base, at, inside, TYPE: tl.constexpr, INF: tl.constexpr):
    """Non-negative integers in the order of the scores, which of them are NaN, and which negative."""
    raw = tl.load(base + at, inside, other=0)
    if TYPE.primitive_bitwidth == 64:
        key = raw.to(tl.int64, bitcast=True) & 0x7FFF_FFFF_FFFF_FFFF
        sign = raw.to(tl.int64, bitcast=True) < 0
    else:
        key = (raw & ((1 << (TYPE.primitive_bitwidth - 1)) - 1)).to(tl.int32)
        sign = (raw >> (TYPE.primitive_bitwidth - 1)) != 0
    nan = key > INF
    return key, nan, sign & (key != 0) & (nan == 0)


@triton.jit
def _histogram_kernel(
    table,  # [3, chunks] int64: address of the scores, address of the bits, entries
    state,  # [2] int64: the digits found so far, how many of the keys that have them are still to be selected
    histograms,  # [chunks, BINS] int32
    invalid,  # [chunks, 2] int32: NaN, negative; written if FIRST
    chunks,
    TYPE: tl.constexpr,
    ABS: tl.constexpr,
    INF: tl.constexpr,
    SHIFT: tl.constexpr,
    FIRST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    base = pointer(tl.load(table + chunk), TYPE, ALIGNED)
    count = tl.load(table + 2 * chunks + chunk)
    prefix = tl.load(state)
    total = tl.zeros((BINS,), tl.int32)
    nans = tl.zeros((BLOCK,), tl.int32)
    negatives = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < count
        key, nan, negative = _load_keys(base, at, inside, TYPE, INF)
        counted = inside & (nan == 0)
        if FIRST:
            nans += (inside & nan).to(tl.int32)
            if not ABS:
                negatives += (inside & negative).to(tl.int32)
        else:
            counted = counted & ((key >> (SHIFT + 8)).to(tl.int64) == prefix)
        digit = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
        total += tl.histogram(digit, BINS, mask=counted)
    tl.store(histograms + chunk * BINS + tl.arange(0, BINS), total)
    if FIRST:
        tl.store(invalid + 2 * chunk, tl.sum(nans, 0))
        tl.store(invalid + 2 * chunk + 1, tl.sum(negatives, 0))


@triton.jit
def _digit_kernel(
    histogram,  # [BINS] int64, of all chunks
    state,  # [2] int64, as of _histogram_kernel; advanced by one digit
    BINS: tl.constexpr,
):
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bins)
    wanted = tl.load(state + 1)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    # The digit at which enough are reached: one at most.
    digit = tl.max(tl.where((above < wanted) & (above + counts >= wanted), bins, 0), 0)
    tl.store(state, tl.load(state) * BINS + digit)
    tl.store(state + 1, wanted - tl.sum(tl.where(bins > digit, counts, 0), 0))


@triton.jit
def _emit_kernel(
    table,  # as of _histogram_kernel
    state,  # [2] int64: the threshold's key, how many of its equals to take
    ties_before,  # [chunks] int64: equals of the threshold in the chunks before
    counts,  # [chunks] int32
    chunks,
    TYPE: tl.constexpr,
    INF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    base = pointer(tl.load(table + chunk), TYPE, ALIGNED)
    bits = tl.load(table + chunks + chunk).to(tl.pointer_type(tl.uint8))
    count = tl.load(table + 2 * chunks + chunk)
    threshold = tl.load(state)
    quota = tl.load(state + 1) - tl.load(ties_before + chunk)
    padded = (count + 63) // 64 * 8
    selected = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < count
        key, nan, _ = _load_keys(base, at, inside, TYPE, INF)
        valid = inside & (nan == 0)
        tie = (valid & (key.to(tl.int64) == threshold)).to(tl.int32)
        take = (valid & (key.to(tl.int64) > threshold)) | ((tie != 0) & (tl.cumsum(tie, 0) <= quota))
        quota -= tl.sum(tie, 0)
        selected += take.to(tl.int32)
        byte = tl.sum(tl.reshape(take.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :], 1)
        where = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(bits + where, byte.to(tl.uint8), where < padded)
    tl.store(counts + chunk, tl.sum(selected, 0))


def select_topk(scores: list[Tensor], k: int, abs_: bool) -> Found:
    """Launch; ``scores`` contiguous, of one dtype and device, at least one tensor. NaN is never selected."""
    device, dtype = scores[0].device, scores[0].dtype
    size = dtype.itemsize
    chunks = chunks_of([score.numel() for score in scores])
    n = len(chunks.tensor)
    bits = [torch.empty((s.numel() + 63) // 64 * 8, dtype=torch.uint8, device=device) for s in scores]
    begin = chunks.index * CHUNK
    starts = addresses(scores)[chunks.tensor] + begin * size
    table = torch.stack([starts, addresses(bits)[chunks.tensor] + begin // 8, chunks.count]).to(device)
    state = torch.tensor([0, k], dtype=torch.int64).to(device)
    tensor = chunks.tensor.to(device)
    invalid = torch.zeros((n, 2), dtype=torch.int32, device=device)
    counts = torch.zeros(n, dtype=torch.int32, device=device)
    histograms = torch.empty((n, BINS), dtype=torch.int32, device=device)
    common = {
        "TYPE": integer(size),
        "INF": INFINITY[dtype],
        "ALIGNED": aligned(starts),
        "BLOCK": BLOCK,
        "num_warps": 8,
    }
    if n:
        for shift in range(8 * size - DIGIT, -1, -DIGIT):
            first = shift == 8 * size - DIGIT
            _histogram_kernel[(n,)](
                table, state, histograms, invalid, n, SHIFT=shift, FIRST=first, ABS=abs_, BINS=BINS, **common
            )
            _digit_kernel[(1,)](histograms.sum(0, dtype=torch.int64), state, BINS=BINS, num_warps=4)
        if k == 0:
            state[0] = torch.iinfo(torch.int64).max  # above every key
        ties = histograms.index_select(1, state[:1] & (BINS - 1))[:, 0].to(torch.int64)
        _emit_kernel[(n,)](table, state, ties.cumsum(0) - ties, counts, n, **common)
    per_tensor = torch.zeros((len(scores), 3), dtype=torch.int64, device=device)
    per_tensor.index_add_(0, tensor, torch.cat([counts[:, None], invalid], 1).to(torch.int64))
    return Found(bits, per_tensor[:, 0], per_tensor[:, 1:], state[:1])
