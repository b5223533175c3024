"""Exact top-k of scores that are never in one place: histograms of keys, summed over pieces (and ranks).

The key of a non-negative float is its bits as an integer, which has the floats' order; 16 bits of it are decided per
pass, from the highest. ``threshold`` takes two passes for float32, then one marks the selected entries; reads of files
(``_streaming``) may leave out the second and have passes of their own.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cwfast import _picks

DIGIT = 16  # bits of a key that one pass decides: the counters of a thread (256 KB) stay in its second-level cache
_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Reduce = Callable[[Tensor], Tensor]


class Threshold(NamedTuple):
    """The k-th largest key, and how many entries that have it belong to the k largest (at least 1 unless k is 0)."""

    key: int
    ties: int


def check(scores: Tensor, absolute: bool) -> Tensor:
    """``[NaN, negative]`` counts, int64."""
    if scores.numel() == 0 or (not absolute and bool(scores.amin() >= 0)):  # a NaN would be the minimum
        return torch.zeros(2, dtype=torch.int64, device=scores.device)
    bad = torch.stack([scores.isnan().sum(), (scores < 0).sum()])
    return bad * torch.tensor([1, 0], device=bad.device) if absolute else bad


def keys(scores: Tensor) -> Tensor:
    """Keys of the absolute values of flat scores; -1 for NaN, which no threshold selects. ``-0.0`` is 0."""
    item = scores.element_size()
    found = scores.view(_INT[item]) & _above(item)  # without the sign
    infinity = int(torch.tensor(torch.inf, dtype=scores.dtype).view(_INT[item]))
    return found.masked_fill_(found > infinity, -1) if len(found) and int(found.amax()) > infinity else found


def threshold(pieces: Callable[[], Iterable[Tensor]], item_size: int, k: int, reduce: Reduce) -> Threshold:
    """Of the keys that ``pieces`` gives anew for each pass; k of them, at least, are not -1.

    Args:
        pieces: the flat keys, in any order.
        item_size: bytes of a score.
        k: how many are selected.
        reduce: sums a histogram over ranks.
    """
    if k == 0:
        return Threshold(_above(item_size), 0)
    prefix, remaining = 0, k
    for shift in range(8 * item_size - DIGIT, -1, -DIGIT):
        histogram = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for piece in pieces():
            if shift + DIGIT < 8 * item_size:
                rest = piece[piece >> (shift + DIGIT) == prefix]
            else:
                rest = piece[piece >= 0] if len(piece) and int(piece.amin()) < 0 else piece
            histogram += torch.bincount((rest >> shift) & ((1 << DIGIT) - 1), minlength=1 << DIGIT)
        from_top = reduce(histogram).flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, remaining))
        remaining -= int(from_top[place - 1]) if place else 0
        prefix = prefix << DIGIT | ((1 << DIGIT) - 1 - place)
    return Threshold(prefix, remaining)


def mark(piece: Tensor, key: int, ties: int) -> tuple[Tensor, int]:
    """Packed bits of the selected entries of one piece, the first ``ties`` equal ones among them; and ties left."""
    mask, equal = piece > key, piece == key
    count = int(equal.sum())
    if count and ties:
        mask |= equal if count <= ties else equal & (equal.cumsum(0) <= ties)
    return _picks.pack(mask), max(ties - count, 0)


def score_of(key: int, dtype: torch.dtype) -> float:
    """The score that has this key; infinity for no score."""
    if key == _above(dtype.itemsize):
        return float("inf")
    return torch.tensor([key], dtype=_INT[dtype.itemsize]).view(dtype).double().item()


def _above(item_size: int) -> int:
    """All bits but the sign: above the key of every score, as NaN's is -1."""
    return (1 << (8 * item_size - 1)) - 1
