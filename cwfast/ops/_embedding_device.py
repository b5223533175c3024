"""accumulate_embedding_saliency_ on devices: rows in the order of (token, sample), and launches for triton and cuda.

Both backends own a token's entries and walk its rows in order, without atomics: the same bits on every run. The CUDA
kernel cuts the rows of frequent tokens into pieces of a length that follows from the shapes alone.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cwfast import _backends
from cwfast.ops._library import written

DTYPES = (*_backends.CUDA_DTYPES, torch.float64)  # CwfastDtype of csrc/cuda/launchers.h
PIECE = 128  # rows at least: what a piece writes and reads again is a small part of what it reads
WORKSPACE = 32 << 20  # bytes of the pieces of all tokens at most


class Rows(NamedTuple):
    """The rows that count, equal tokens side by side and each token's samples ascending.

    Attributes:
        order: int64 ``[n]``, rows of grad_outputs.
        samples: int64 ``[n]``, whose they are.
        tokens: int64 ``[tokens]``, those that occur, ascending.
        firsts: int64 ``[tokens + 1]``, where in order each token's rows begin, and n.
    """

    order: Tensor
    samples: Tensor
    tokens: Tensor
    firsts: Tensor


class Pieces(NamedTuple):
    """The rows of each token in pieces of ``rows``, the last one shorter; see ``CwfastEmbedding`` in launchers.h."""

    rows: int
    firsts: Tensor
    tokens: Tensor
    cut: Tensor
    slots: Tensor
    partial: Tensor


def by_token(owner: Tensor, indices: Tensor, padding_idx: int) -> Rows:
    """``owner`` ascends, so that a stable sort by token leaves samples ascending. Waits for the device."""
    if padding_idx < 0:
        order = indices.argsort(stable=True)
    else:
        order = (indices != padding_idx).nonzero()[:, 0]
        order = order[indices[order].argsort(stable=True)]
    token = indices[order]
    new = torch.ones_like(token, dtype=torch.bool)
    new[1:] = token[1:] != token[:-1]
    firsts = new.nonzero()[:, 0]
    return Rows(order, owner[order], token[firsts], torch.cat([firsts, firsts.new_tensor([len(token)])]))


def run(
    out: Tensor,
    owner: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    padding_idx: int,
    grad: Tensor | None,
    backend: str,
) -> None:
    """Launch; arguments as of ``cwfast.ops.accumulate_embedding_saliency_``, ``backend`` "triton" or "cuda"."""
    rows = by_token(owner, indices, padding_idx)
    if not len(rows.order) or not out.numel():
        return
    if backend == "cuda":
        _cuda(out, rows, grad_outputs, power, scale, factor, grad)
    else:
        kernel = _backends.triton_kernels("embedding_saliency").accumulate_embedding_saliency_
        kernel(out, *rows, grad_outputs, power, scale, factor, grad)
    written([out] if grad is None else [out, grad])


def pieces_of(rows: Rows, out: Tensor) -> Pieces:
    """Neither a piece nor the pieces of a token become a long walk, and the workspace stays small."""
    count, columns = len(rows.order), out.shape[1]
    # At most 2 count / length pieces belong to tokens that have several; each writes 4 rows.
    length = max(PIECE, math.isqrt(count), -(-8 * count * columns * out.element_size() // WORKSPACE))
    each = (rows.firsts.diff() + length - 1) // length
    firsts = torch.cat([each.new_zeros(1), each.cumsum(0)])
    tokens = torch.arange(len(each), device=each.device).repeat_interleave(each)
    cut = (each > 1).nonzero()[:, 0]
    slots = torch.where(each > 1, each, 0).cumsum(0)
    partial = out.new_empty((4 * int(slots[-1]), columns))
    return Pieces(length, firsts, tokens, cut, slots - each, partial)


def _cuda(
    out: Tensor,
    rows: Rows,
    grad_outputs: Tensor,
    power: int,
    scale: float,
    factor: Tensor | None,
    grad: Tensor | None,
) -> None:
    pieces = pieces_of(rows, out)

    def matrix(x: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0, 0) if x is None else (x.data_ptr(), DTYPES.index(x.dtype), *x.stride())

    _backends.native().cuda_embedding_saliency(
        *map(matrix, (out, grad, grad_outputs, factor, pieces.partial)),
        *(x.data_ptr() for x in (*rows, pieces.firsts, pieces.tokens, pieces.cut, pieces.slots)),
        len(pieces.tokens),
        len(pieces.cut),
        pieces.rows,
        out.shape[1],
        power,
        scale,
        out.device.index or 0,
        _backends.cuda_stream(out.device),
    )
