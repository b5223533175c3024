"""Select and gather over tensors on disk, read in bounded pieces: memory does not grow with the checkpoint."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cwfast import _backends, _checks, _picks, _radix, ops
from cwfast.checkpoint import Checkpoint
from cwfast.ops.rewind import Bits
from cwfast.ops.select import check_options, invalid, packed_bytes

_KEPT = 1 << 22  # entries that the last read may keep, 16 bytes each


class _Marks(NamedTuple):
    bits: Tensor  # packed, of the entries at or above the bracket
    inside: Tensor  # packed, of those inside it
    above: int
    within: int
    nans: int
    negatives: int


class _Pieces:
    """What a read of the named tensors does with each piece, by the kernels or by torch."""

    def __init__(self, scores: Checkpoint, names: Sequence[str], dtype: torch.dtype, backend: str) -> None:
        self.scores, self.names, self.dtype = scores, names, dtype
        self.native = _backends.native() if backend == "cpu" else None
        self.code = getattr(self.native.Dtype, str(dtype).removeprefix("torch.")) if self.native else None

    def histogram(self, low: int, shift: int, count: int) -> Tensor:
        """One read: how many keys lie in ``[low + (b << shift), low + (b + 1 << shift))``, for ``count`` bins b."""
        pieces = (piece for name in self.names for piece in self.scores.pieces(name))
        if not self.native:
            return _radix.histogram(map(_radix.keys, pieces), low, shift, count)
        bins = torch.zeros(count, dtype=torch.int64)
        for piece in pieces:
            where = (piece.data_ptr(), len(piece), self.code)
            self.native.score_histogram(*where, low, shift, bins.data_ptr(), count)
        return bins

    def mark(self, piece: Tensor, low: int, high: int) -> _Marks:
        """The entries of one piece above and inside the keys ``[low, high)``."""
        if self.native:
            bits, inside = (torch.empty(packed_bytes(len(piece)), dtype=torch.uint8) for _ in range(2))
            where = (piece.data_ptr(), len(piece), self.code)
            counts = self.native.mark_scores(*where, low, high, bits.data_ptr(), inside.data_ptr())
            return _Marks(bits, inside, *counts)
        keys = _radix.keys(piece)
        above, within = keys >= high, (keys >= low) & (keys < high)
        counts = (int(above.sum()), int(within.sum()), *_radix.check(piece, False).tolist())
        return _Marks(_picks.pack(above), _picks.pack(within), *counts)


def select_topk(
    scores: Checkpoint, names: Sequence[str], k: int, nan: str, backend: str = "auto"
) -> tuple[list[Bits], float]:
    """``ops.select_topk`` of the named tensors, bit for bit: picks in the smaller form, and the threshold.

    One read counts keys by their upper 16 bits; one marks what lies above the bin of the k-th largest and keeps what
    lies inside it. A bin of more than ``_KEPT`` entries is first counted by its next 16 bits. Memory: a piece, the
    packed bits of one tensor, the kept entries, the result. Raises as ``ops.select_topk`` does.
    """
    dtypes = {scores.entries[name].dtype for name in names}
    if len(dtypes) > 1 or not dtypes <= set(_checks.FLOATS):
        raise TypeError(
            f"scores must have one dtype of {_checks.FLOATS}; got {sorted(map(str, dtypes))} in {scores.path}"
        )
    numel = {name: math.prod(scores.entries[name].shape) for name in names}
    check_options(k, sum(numel.values()), nan)
    dtype = dtypes.pop() if dtypes else torch.float32
    pieces = _Pieces(scores, names, dtype, _backends.resolve(backend, torch.device("cpu"), ("reference", "cpu")))
    bracket = _radix.bracket(pieces.histogram, dtype, k, _KEPT)
    picks, keys, at = [], [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    ties, nans = bracket.needed, 0  # ties: entries that are still to be taken, where all inside are equal
    for name in names:
        parts, bad = [torch.empty(0, dtype=torch.uint8)], [0, 0]
        for begin, piece in _numbered(scores.pieces(name)):
            marks = pieces.mark(piece, bracket.low, bracket.high)
            bad = [bad[0] + marks.nans, bad[1] + marks.negatives]
            if bracket.high - bracket.low > 1 and marks.within:
                inside = _picks.to_indices(marks.inside, len(piece))
                keys.append(_radix.keys(piece[inside]).long())
                at.append(inside + begin)
            elif ties and marks.within:
                inside = _picks.to_indices(marks.inside, len(piece))[:ties]
                _picks.set_(marks.bits, inside)
                ties -= len(inside)
            parts.append(marks.bits)
        where = f"scores[{name!r}], shape {scores.entries[name].shape}"
        if message := invalid(bad[0], bad[1], nan == "skip", numel[name], where):
            raise ValueError(message)
        nans += bad[0]
        picks.append(_picks.compact(torch.cat(parts), numel[name]))
        at.append(torch.tensor([-1]))  # ends a tensor's
        keys.append(at[-1])
    if k > sum(numel.values()) - nans:
        raise ValueError(
            f"k must be at most {sum(numel.values()) - nans}, the number of scores that are not NaN; got {k}"
        )
    if k == 0:
        return picks, math.inf
    if bracket.high - bracket.low == 1:
        return picks, _radix.score_of(bracket.low, dtype)
    return _finish(picks, list(numel.values()), torch.cat(keys), torch.cat(at), bracket.needed, dtype)


def _finish(
    picks: list[Bits], numel: Sequence[int], keys: Tensor, at: Tensor, needed: int, dtype: torch.dtype
) -> tuple[list[Bits], float]:
    """Adds the ``needed`` largest of the kept entries, ties to the first; -1 ends those of a tensor."""
    ranked = keys.numpy()
    threshold = int(np.partition(ranked, len(ranked) - needed)[len(ranked) - needed])
    equal = (keys == threshold).nonzero()[:, 0]
    chosen = keys > threshold
    chosen[equal[: needed - int(chosen.sum())]] = True
    begin, found = 0, []
    for i, end in enumerate((at < 0).nonzero()[:, 0].tolist()):
        bits = picks[i]
        more = at[begin:end][chosen[begin:end]]
        if len(more):
            bits = _picks.to_bits(bits, numel[i])
            _picks.set_(bits, more)
            bits = _picks.compact(bits, numel[i])
        found.append(bits)
        begin = end + 1
    return found, _radix.score_of(threshold, dtype)


def _numbered(pieces: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each piece with the index of its first entry."""
    begin = 0
    for piece in pieces:
        yield begin, piece
        begin += len(piece)


def positive(scores: Checkpoint, names: Sequence[str]) -> int:
    """How many scores are above 0."""
    return sum(int((piece > 0).sum()) for name in names for piece in scores.pieces(name))


def gather(
    source: Checkpoint,
    picks: Mapping[str, Bits],
    names: Mapping[str, str],
    ranges: Mapping[str, tuple[int, int]] | None = None,
) -> list[Tensor]:
    """The selected entries of tensors on disk, in their dtype on the CPU: everything is read once.

    Args:
        source: the file or folder.
        picks: of each tensor, on the CPU; one compact 1-D tensor comes back for each.
        names: what each is called in ``source``.
        ranges: of tensors whose picks count from ``begin`` to ``end`` of the flat tensor; only that is read.
    """
    found = []
    for name, bits in picks.items():
        parts = [torch.empty(0, dtype=source.entry(names[name]).dtype)]
        if _picks.count(bits):
            first, last = (ranges or {}).get(name, (0, None))
            for begin, piece in _numbered(source.pieces(names[name], begin=first, end=last)):
                parts += ops.gather([piece], [_picks.part(bits, begin, begin + len(piece))])
        found.append(torch.cat(parts))
    return found
