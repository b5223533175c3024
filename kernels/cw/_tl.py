"""What kernels share: one launch for a whole list of tensors, by a table of chunks on the device; tiles in strips."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 65_536  # entries of a chunk: a program's work, and the block of the (low, offset) form
_INTEGER = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


class Chunks(NamedTuple):
    """The chunks of a list of tensors.

    Attributes:
        tensor: int64 ``[chunks]``, which tensor a chunk belongs to.
        index: int64 ``[chunks]``, which chunk of its tensor it is.
        count: int64 ``[chunks]``, its entries.
        first: int64 ``[tensors + 1]``, where each tensor's chunks begin.
    """

    tensor: Tensor
    index: Tensor
    count: Tensor
    first: Tensor


def chunks_of(numels: Sequence[int]) -> Chunks:
    """The chunks of tensors with so many entries; on the CPU."""
    sizes = torch.tensor(numels, dtype=torch.int64)
    each = (sizes + CHUNK - 1) // CHUNK
    first = torch.zeros(len(numels) + 1, dtype=torch.int64)
    torch.cumsum(each, 0, out=first[1:])
    tensor = torch.repeat_interleave(torch.arange(len(numels)), each)
    index = torch.arange(len(tensor)) - first[tensor]
    return Chunks(tensor, index, (sizes[tensor] - index * CHUNK).clamp(max=CHUNK), first)


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """Where the tensors begin, int64, on the CPU."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


@triton.jit
def pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An int64 address as a pointer; ALIGNED promises a multiple of 16 bytes, without which loads are not vectors."""
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(TYPE))


@triton.jit
def quarters(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile in four strips of columns; each thread keeps its registers."""
    left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(left, (ROWS, 2, COLUMNS // 4)), (0, 2, 1)))
    c, d = tl.split(tl.permute(tl.reshape(right, (ROWS, 2, COLUMNS // 4)), (0, 2, 1)))
    return a, b, c, d


def integer(size: int) -> tl.dtype:
    """The unsigned integer type of so many bytes: entries are moved and compared as such."""
    return getattr(tl, _INTEGER[size])


def aligned(address: Tensor) -> bool:
    """Whether all the addresses are multiples of 16 bytes."""
    return bool((address % 16 == 0).all())
