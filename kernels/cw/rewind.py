"""target[i] = source[i] for every selected entry i of every tensor: rewind_, and gather and scatter_, where one side is
compact (values[rank of i]).

Reference: ``cwfast.reference``. Called by ``cwfast.ops._rewind_device`` (backend "triton"), which builds the table:
``CwfastSelected`` of csrc/cuda/launchers.h. Reads the picks (1/8 byte an entry, or 2 bytes a selected one) and touches
two entries for each selected one. Not yet run on a GPU.
"""

import triton
import triton.language as tl
from cwfast.kernels._tl import integer, pointer
from torch import Tensor

BLOCK = tl.constexpr(65_536)  # entries of a program
SLICES = tl.constexpr(8)  # of a block: their bits are counted apart, as backend "cuda" needs them
ROW = tl.constexpr(12)  # columns of the table: first block, entries, picks, offset, k, ranks, and of target and source
TARGET, SOURCE = tl.constexpr(6), tl.constexpr(9)  # address, dimensions, layout
TENSORS = tl.constexpr(128)  # rows looked through at a time
AT_ONCE = tl.constexpr(1024)  # entries moved together: 4 a thread; 1% of a block is less


@triton.jit
def _part(table, tensors):
    """Which row this program works on, which block of that tensor, and how many entries that has."""
    program = tl.program_id(0).to(tl.int64)
    row = program * 0 - 1  # the last row whose first block is not after this one
    for start in range(0, tensors, TENSORS):
        at = start + tl.arange(0, TENSORS)
        first = tl.load(table + at * ROW, at < tensors, other=program + 1)
        row += tl.sum((first <= program).to(tl.int32), 0)
    block = program - tl.load(table + row * ROW)
    length = tl.minimum(tl.load(table + row * ROW + 1) - block * BLOCK, BLOCK)
    return row, block, length


@triton.jit
def _survey_kernel(
    table,  # [tensors, ROW] int64
    tensors,
    counts,  # [blocks, SLICES] int64: bits set; 0 for a list
    wrong,  # [tensors] int32: |= what is wrong with the picks: CwfastWrongPicks
):
    row, block, length = _part(table, tensors)
    own = table + row * ROW
    offset = tl.load(own + 3).to(tl.pointer_type(tl.int64))
    k = tl.load(own + 4)
    found = tl.full((), 0, tl.int32)
    count = tl.zeros((SLICES,), tl.int32)
    if tl.load(own + 3) != 0:
        low = tl.load(own + 2).to(tl.pointer_type(tl.uint16))
        blocks = (tl.load(own + 1) + BLOCK - 1) // BLOCK
        if block == 0:
            found += ((tl.load(offset) != 0) | (tl.load(offset + blocks) != k)).to(tl.int32) * 2
        if length > 0:
            begin, end = tl.load(offset + block), tl.load(offset + block + 1)
            falls = (begin < 0) | (end < begin) | (end > k)
            found += falls.to(tl.int32) * 4
            bad = tl.zeros((AT_ONCE,), tl.int32)
            for start in range(begin, tl.where(falls, begin, end), AT_ONCE):
                i = start + tl.arange(0, AT_ONCE)
                position = tl.load(low + i, i < end, other=0).to(tl.int32)
                last = tl.load(low + i - 1, (i < end) & (i > begin), other=0).to(tl.int32)
                bad |= ((i < end) & ((position >= length) | ((i > begin) & (position <= last)))).to(tl.int32)
            found += tl.max(bad, 0) * 8
    else:
        words = tl.load(own + 2).to(tl.pointer_type(tl.uint32)) + block * (BLOCK // 32)
        i = tl.arange(0, BLOCK // 32)
        word = tl.load(words + i, i < (length + 63) // 64 * 2, other=0)
        used = length - 32 * i  # bits of the word that stand for entries
        shift = tl.minimum(tl.maximum(used, 0), 31).to(tl.uint32)
        found += tl.max(((used < 32) & ((word >> shift) != 0)).to(tl.int32), 0)
        word = word - ((word >> 1) & 0x5555_5555)  # bits set, in pairs, fours and eights
        word = (word & 0x3333_3333) + ((word >> 2) & 0x3333_3333)
        word = (word + (word >> 4)) & 0x0F0F_0F0F
        word = word + (word >> 8)
        set_ = ((word + (word >> 16)) & 0x3F).to(tl.int32)
        count += tl.sum(tl.reshape(set_, (SLICES, BLOCK // 32 // SLICES)), 1)
    if found != 0:
        tl.atomic_or(wrong + row, found)
    at = tl.program_id(0).to(tl.int64) * SLICES + tl.arange(0, SLICES)
    tl.store(counts + at, count.to(tl.int64))


@triton.jit
def _place(view, layouts, flat, rank):
    """Where the selected entries lie that have these flat indices and ranks; ``CwfastView`` at ``view``."""
    dims = tl.load(view + 1)
    at = flat
    if dims < 0:
        at = rank
    if dims > 0:
        left = flat
        at = flat * 0
        layout = layouts + tl.load(view + 2)
        for d in range(0, dims):
            size = tl.load(layout + 2 * d)
            at += left % size * tl.load(layout + 2 * d + 1)
            left = left // size
    return at


@triton.jit
def _move(own, layouts, flat, rank, take, TYPE: tl.constexpr):
    target = pointer(tl.load(own + TARGET), TYPE, False)
    source = pointer(tl.load(own + SOURCE), TYPE, False)
    value = tl.load(source + _place(own + SOURCE, layouts, flat, rank), take)
    tl.store(target + _place(own + TARGET, layouts, flat, rank), value, take)


@triton.jit
def _move_kernel(
    table,  # [tensors, ROW] int64, then the layouts
    tensors,
    TYPE: tl.constexpr,
):
    row, block, length = _part(table, tensors)
    own = table + row * ROW
    layouts = table + tensors * ROW
    if length > 0:
        begin = block * BLOCK
        if tl.load(own + 3) != 0:
            low = tl.load(own + 2).to(tl.pointer_type(tl.uint16))
            offset = tl.load(own + 3).to(tl.pointer_type(tl.int64)) + block
            end = tl.load(offset + 1)
            for start in range(tl.load(offset), end, AT_ONCE):
                rank = start + tl.arange(0, AT_ONCE)
                position = tl.load(low + rank, rank < end, other=0)
                _move(own, layouts, begin + position.to(tl.int64), rank, rank < end, TYPE)
        else:
            words = tl.load(own + 2).to(tl.pointer_type(tl.uint32)) + block * (BLOCK // 32)
            taken = begin * 0
            if tl.load(own + 5) != 0:
                ranks = tl.load(own + 5).to(tl.pointer_type(tl.int64))
                taken += tl.load(ranks + block * SLICES) - tl.load(ranks)
            for start in range(0, length, AT_ONCE):
                i = start + tl.arange(0, AT_ONCE)
                word = tl.load(words + i // 32, i < length, other=0)
                bit = ((word >> (i % 32).to(tl.uint32)) & 1).to(tl.int32)
                count = tl.sum(bit, 0)
                if count > 0:
                    rank = taken + tl.cumsum(bit, 0) - 1
                    _move(own, layouts, begin + i, rank, bit != 0, TYPE)
                taken += count


def survey(table: Tensor, tensors: int, blocks: int, counts: Tensor, wrong: Tensor) -> None:
    """Launch; see ``_survey_kernel``."""
    _survey_kernel[(blocks,)](table, tensors, counts, wrong, num_warps=8)


def move(table: Tensor, tensors: int, blocks: int, item_size: int) -> None:
    """Launch; ``item_size``: bytes of an entry, which is only copied: the unsigned integer of its size does."""
    _move_kernel[(blocks,)](table, tensors, TYPE=integer(item_size), num_warps=8)
