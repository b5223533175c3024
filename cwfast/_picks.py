"""The two forms of a set of selected entries of one tensor, and the ways between them.

Packed bits (N / 8 bytes) cost the same at any density. Lists hold ``low`` uint16, the positions inside blocks of
65,536 entries, and ``offset`` int64, where each block begins in ``low``: 2 bytes a selected entry, so the smaller form
below 1/16 of the entries.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cwfast import _backends, reference
from cwfast.ops._rewind_moves import BACKENDS, Picks, pointers, wrong_picks
from cwfast.ops.rewind import Bits
from cwfast.ops.select import packed_bytes

LIST_BELOW = 1 / 16  # density at which 2 bytes an entry meet 1/8 byte a weight
_STRIDE = 1 << 25  # entries converted at a time: a multiple of BLOCK, and the temporaries stay below 300 MB


def compact(bits: Bits, numel: int) -> Bits:
    """The smaller of the two forms."""
    k = count(bits)
    return to_list(bits, numel, k) if k < LIST_BELOW * numel else to_bits(bits, numel)


def to_list(bits: Bits, numel: int, k: int | None = None) -> tuple[Tensor, Tensor]:
    """``(low, offset)``; a list is returned as it is. ``k``: how many entries are selected, where that is known."""
    if isinstance(bits, tuple):
        return bits
    if _backend(bits.device) == "cpu":
        low = torch.empty(count(bits) if k is None else k, dtype=torch.uint16)
        offset = torch.empty(-(-numel // reference.BLOCK) + 1, dtype=torch.int64)
        _backends.native().list_picks(numel, bits.data_ptr(), low.data_ptr(), offset.data_ptr())
        return low, offset
    lows, ends = [torch.empty(0, dtype=torch.uint16, device=bits.device)], [bits.new_zeros(1, dtype=torch.int64)]
    total = 0
    for begin in range(0, numel, _STRIDE):
        part = min(_STRIDE, numel - begin)
        found = _indices(bits[begin // 8 : packed_bytes(begin + part)])
        edges = torch.arange(1, -(-part // reference.BLOCK) + 1, device=bits.device) * reference.BLOCK
        ends.append(torch.searchsorted(found, edges) + total)
        lows.append((found % reference.BLOCK).to(torch.uint16))
        total += len(found)
    return torch.cat(lows), torch.cat(ends)


def to_bits(bits: Bits, numel: int) -> Tensor:
    """Packed bits; those are returned as they are. A list must have been checked."""
    if not isinstance(bits, tuple):
        return bits
    packed = torch.zeros(packed_bytes(numel), dtype=torch.uint8, device=bits[0].device)
    for indices in _list_parts(bits):
        set_(packed, indices)
    return packed


def set_(packed: Tensor, indices: Tensor) -> None:
    """Sets bits that are not set, each named once: a sum of different bits is their union."""
    packed.scatter_add_(0, indices >> 3, (1 << (indices & 7)).to(torch.uint8))


def to_indices(bits: Bits, numel: int) -> Tensor:
    """Flat indices, int64, ascending: 8 bytes a selected entry."""
    low, offset = to_list(bits, numel)
    return torch.cat([torch.empty(0, dtype=torch.int64, device=low.device), *_list_parts((low, offset))])


def join(parts: Sequence[tuple[Bits, int]]) -> Bits:
    """The smaller form for a tensor in pieces, each with its number of entries: all but the last of whole blocks."""
    lists = [bits for bits, _ in parts if isinstance(bits, tuple)]
    numel = sum(size for _, size in parts)
    if parts and len(lists) == len(parts) and sum(len(low) for low, _ in lists) < LIST_BELOW * numel:
        begin, offsets = 0, [torch.zeros(1, dtype=torch.int64)]
        for low, offset in lists:
            offsets.append(offset[1:] + begin)
            begin += len(low)
        return torch.cat([low for low, _ in lists]), torch.cat(offsets)
    return compact(torch.cat([torch.empty(0, dtype=torch.uint8), *(to_bits(*part) for part in parts)]), numel)


def part(bits: Bits, begin: int, end: int) -> Bits:
    """Those of the entries from ``begin`` to ``end``: multiples of 65,536, or ``end`` the number of entries."""
    if not isinstance(bits, tuple):
        return bits[begin // 8 : packed_bytes(end)]
    low, offset = bits
    edges = offset[begin // reference.BLOCK : -(-end // reference.BLOCK) + 1]
    return low[int(edges[0]) : int(edges[-1])], edges - edges[0]


def count(bits: Bits) -> int:
    """How many entries are selected."""
    if isinstance(bits, tuple):
        return len(bits[0])
    if bits.device.type == "cpu":
        return int(np.bitwise_count(bits.numpy().view(np.uint64)).sum(dtype=np.int64))  # whole words: packed_bytes
    table = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=bits.device)
    return sum(int(table[part.to(torch.int32)].sum(dtype=torch.int64)) for part in bits.split(_STRIDE // 8))


def native(bits: Bits, numel: int) -> tuple[int, int, int, int, int]:
    """Picks on the CPU as cwfast._C takes them: (numel, bits, low, offset, k)."""
    return pointers(Picks(numel, *bits) if isinstance(bits, tuple) else Picks(numel, bits, None))


def to_device(bits: Bits, device: torch.device | str) -> Bits:
    """The same form on another device."""
    return tuple(part.to(device) for part in bits) if isinstance(bits, tuple) else bits.to(device)  # type: ignore[return-value]


def wrong(bits: Bits, numel: int) -> str:
    """Empty where ``bits`` names entries below ``numel``, each once, in a legal form; else what is wrong."""
    low, offset = bits if isinstance(bits, tuple) else (bits, None)
    if offset is None and (low.dtype != torch.uint8 or low.shape != (packed_bytes(numel),)):
        return f"must be uint8 of {packed_bytes(numel)} bytes; got {low.dtype} of shape {tuple(low.shape)}"
    if offset is not None:
        blocks = -(-numel // reference.BLOCK)
        if low.dtype != torch.uint16 or low.ndim != 1 or offset.dtype != torch.int64 or offset.shape != (blocks + 1,):
            return (
                f"must be low uint16 [k] and offset int64 [{blocks + 1}]; got {low.dtype} {tuple(low.shape)} and "
                + (f"{offset.dtype} {tuple(offset.shape)}")
            )
        offset = offset.contiguous()
    return wrong_picks([Picks(numel, low.contiguous(), offset)], _backend(low.device))[1]


def pack(mask: Tensor) -> Tensor:
    """``reference.pack`` of a flat mask; on the CPU by numpy, which is faster."""
    if mask.device.type != "cpu":
        return reference.pack(mask)
    packed = torch.zeros(packed_bytes(len(mask)), dtype=torch.uint8)
    bits = torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    packed[: len(bits)] = bits
    return packed


def _backend(device: torch.device) -> str:
    """Masks on a device may be made where that has no kernels: plain PyTorch works on them."""
    return _backends.resolve("auto", device, BACKENDS) if device.type == "cpu" else "reference"


def _indices(packed: Tensor) -> Tensor:
    """Set bits of a piece; only the bytes that are not zero are looked into."""
    filled = packed.nonzero().reshape(-1)
    where = reference.unpack(packed[filled], len(filled) * 8).nonzero().reshape(-1)
    return filled[where >> 3] * 8 + (where & 7)


def _list_parts(bits: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    """Flat indices of a list, some blocks at a time. Offsets must not decrease."""
    low, offset = bits
    step = _STRIDE // reference.BLOCK
    for first in range(0, len(offset) - 1, step):
        edges = offset[first : first + step + 1]
        block = torch.repeat_interleave(torch.arange(len(edges) - 1, device=low.device) + first, edges.diff())
        yield block * reference.BLOCK + low[int(edges[0]) : int(edges[-1])].to(torch.int64)
