"""Exact top-k of scores that are never in one place: histograms of keys, summed over pieces (and ranks).

The key of a non-negative float is its bits as an integer, which has the floats' order; 16 bits of it are decided per
pass, from the highest: two passes for float32, then one marks the selected entries. Reads of files (``_streaming``) may
leave out the second and have kernels of their own.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cwfast import _picks

DIGIT = 16  # bits of a key that one pass decides: the counters of a thread (256 KB) stay in its second-level cache
_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Bracket(NamedTuple):
    """Keys ``[low, high)`` among which the k-th largest is, and how many entries with such keys are selected.

    Where nothing is selected, ``low`` and ``high`` are above the key of every score, and ``needed`` is 0.
    """

    low: int
    high: int
    needed: int


def check(scores: Tensor, absolute: bool) -> Tensor:
    """``[NaN, negative]`` counts, int64."""
    if scores.numel() == 0 or (not absolute and bool(scores.amin() >= 0)):  # a NaN would be the minimum
        return torch.zeros(2, dtype=torch.int64, device=scores.device)
    bad = torch.stack([scores.isnan().sum(), (scores < 0).sum()])
    return bad * torch.tensor([1, 0], device=bad.device) if absolute else bad


def keys(scores: Tensor) -> Tensor:
    """Keys of the absolute values of flat scores; -1 for NaN, which no threshold selects. ``-0.0`` is 0."""
    item, last = scores.element_size(), top(scores.dtype)
    found = scores.view(_INT[item]) & ((1 << (8 * item - 1)) - 1)  # without the sign
    return found.masked_fill_(found > last, -1) if len(found) and int(found.amax()) > last else found


def histogram(pieces: Iterable[Tensor], low: int, shift: int, count: int) -> Tensor:
    """How many of the keys lie in ``[low + (b << shift), low + (b + 1 << shift))``, for ``count`` bins b."""
    bins = torch.zeros(count, dtype=torch.int64)
    for piece in pieces:
        places = (piece - low) >> shift
        bins += torch.bincount(places[(places >= 0) & (places < count)], minlength=count)
    return bins


def bracket(histogram: Callable[[int, int, int], Tensor], dtype: torch.dtype, k: int, kept: int = 0) -> Bracket:
    """Of all keys, by histograms; one key, or the first bracket whose number of entries ``kept`` allows.

    Args:
        histogram: of all keys; low, shift and count as above.
        dtype: of the scores.
        k: how many are selected; where there are not so many keys but -1, the bracket is as for none.
        kept: entries inside a bracket that need no further pass.
    """
    last = top(dtype)
    low, above, shift = 0, 0, max(last.bit_length() - DIGIT, 0)
    count = (last >> shift) + 1
    while k:
        bins = histogram(low, shift, count)
        from_top = bins.flip(0).cumsum(0) + above
        if k > from_top[-1]:
            break
        place = int(torch.searchsorted(from_top, k))
        inside = int(bins[count - 1 - place])
        above = int(from_top[place]) - inside
        low += (count - 1 - place) << shift
        if shift == 0 or inside <= kept:
            return Bracket(low, min(low + (1 << shift), last + 1), k - above)
        before, shift = shift, max(shift - DIGIT, 0)
        count = 1 << (before - shift)
    return Bracket(last + 1, last + 1, 0)


def mark(piece: Tensor, key: int, ties: int) -> tuple[Tensor, int]:
    """Packed bits of the selected entries of one piece, the first ``ties`` equal ones among them; and ties left."""
    mask, left = taken(piece, key, ties)
    return _picks.pack(mask), left


def taken(keys: Tensor, key: int, ties: int) -> tuple[Tensor, int]:
    """Which keys are above ``key`` or among the first ``ties`` equal ones, bool; and ties left."""
    mask, equal = keys > key, keys == key
    count = int(equal.sum())
    if count and ties:
        mask |= equal if count <= ties else equal & (equal.cumsum(0) <= ties)
    return mask, max(ties - count, 0)


def score_of(key: int, dtype: torch.dtype) -> float:
    """The score that has this key; infinity for no score."""
    if key > top(dtype):
        return float("inf")
    return torch.tensor([key], dtype=_INT[dtype.itemsize]).view(dtype).double().item()


def top(dtype: torch.dtype) -> int:
    """The largest key, infinity's; NaN's is -1."""
    return int(torch.tensor(torch.inf, dtype=dtype).view(_INT[dtype.itemsize]))
