"""Select and gather over tensors on disk, read in bounded pieces: memory does not grow with the checkpoint."""

import bisect
import functools
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cwfast import _backends, _checks, _picks, _radix, ops
from cwfast._workers import in_order
from cwfast.checkpoint import Checkpoint
from cwfast.checkpoint.reader import PIECE, Memory
from cwfast.ops.rewind import Bits
from cwfast.ops.select import check_options, invalid, packed_bytes

_KEPT = 3 << 24  # entries that a read may keep: 2 bytes of position and a score each, 300 MB of float32
_TOGETHER = 16  # pieces whose kept entries are counted at a time: adding up histograms costs more than making one
_SAMPLED = 1 << 26  # entries from which on a sample is drawn: it takes a sixteenth of them at most
_WINDOWS, _WINDOW = 4096, 1024  # windows of a sample, and entries of each: a page of a disk
_SIGMAS = 4.5  # standard deviations of the sampled rank: a bracket fails in one of 100,000 cases, and costs two reads


class _Job(NamedTuple):
    """A piece of a tensor: its entries from ``begin`` to ``end``."""

    name: str
    begin: int
    end: int


class _Part(NamedTuple):
    """What one piece holds above and inside a bracket of keys."""

    numel: int
    bits: Bits  # the entries at or above the bracket
    inside: Bits  # those inside it
    values: Tensor  # and their scores, where they are kept
    above: int
    within: int
    nans: int
    negatives: int

    def also(self, more: Tensor) -> Bits:
        """The entries above the bracket and the ``more``, in the smaller form."""
        if not len(more):
            return self.bits
        bits = _picks.to_bits(self.bits, self.numel)
        bits = bits.clone() if bits is self.bits else bits
        _picks.set_(bits, more)
        return _picks.compact(bits, self.numel)


class _Scores:
    """The named tensors as one list of scores, whose pieces the kernels or torch look at."""

    def __init__(self, source: Checkpoint, names: Sequence[str], dtype: torch.dtype, backend: str) -> None:
        self.source, self.names, self.dtype = source, names, dtype
        self.numel = {name: math.prod(source.entries[name].shape) for name in names}
        self.total = sum(self.numel.values())
        self.native = _backends.native() if backend == "cpu" else None
        self.code = getattr(self.native.Dtype, str(dtype).removeprefix("torch.")) if self.native else None

    def histogram(self, low: int, shift: int, count: int) -> Tensor:
        """One read: how many keys lie in ``[low + (b << shift), low + (b + 1 << shift))``, for ``count`` bins b."""
        jobs = _jobs(self.source, self.names)
        return _total(count, in_order(lambda job: self.count([_read(self.source, job)], low, shift, count), jobs))

    def count(self, pieces: Iterable[Tensor], low: int, shift: int, count: int) -> Tensor:
        """The same of flat scores in memory."""
        if not self.native:
            return _radix.histogram(map(_radix.keys, pieces), low, shift, count)
        bins = torch.zeros(count, dtype=torch.int64)
        for piece in pieces:
            self.native.score_histogram(piece.data_ptr(), len(piece), self.code, low, shift, bins.data_ptr(), count)
        return bins

    def mark(self, low: int, high: int, keep: bool, job: _Job) -> _Part:
        """A piece's entries above and inside the keys ``[low, high)``."""
        piece = _read(self.source, job)
        if self.native:
            bits, inside = (torch.empty(packed_bytes(len(piece)), dtype=torch.uint8) for _ in range(2))
            where = (piece.data_ptr(), len(piece), self.code)
            counts = self.native.mark_scores(*where, low, high, bits.data_ptr(), inside.data_ptr())
        else:
            keys = _radix.keys(piece)
            bits, inside = _picks.pack(keys >= high), _picks.pack((keys >= low) & (keys < high))
            counts = _picks.count(bits), _picks.count(inside), *_radix.check(piece, False).tolist()
        among = _picks.compact(inside, len(piece))
        values = ops.gather([piece], [among])[0] if keep else piece.new_empty(0)
        return _Part(len(piece), _picks.compact(bits, len(piece)), among, values, *counts)

    def settle(self, part: _Part, threshold: int, ties: int) -> Bits:
        """What is above the bracket, and what in it has a key above the threshold or is of the first that have it."""
        if not self.native:
            taken, _ = _radix.taken(_radix.keys(part.values), threshold, ties)
            return part.also(_picks.to_indices(part.inside, part.numel)[taken])
        bits = torch.empty(packed_bytes(part.numel), dtype=torch.uint8)
        picks = (_picks.native(part.bits, part.numel), _picks.native(part.inside, part.numel))
        self.native.settle_marks(*picks, part.values.data_ptr(), self.code, threshold, ties, bits.data_ptr())
        return _picks.compact(bits, part.numel)


def select_topk(
    source: Checkpoint, names: Sequence[str], k: int, nan: str, backend: str = "auto"
) -> tuple[list[Bits], float]:
    """``ops.select_topk`` of the named tensors, bit for bit: picks in the smaller form, and the threshold.

    One read, where a sample has told between which keys the k-th largest lies: what is above them is marked, what is
    among them is kept, and decided at the end. Where there is no sample (few scores), or its keys hold too many entries
    or not the k-th largest, other reads come first, which count keys, 16 bits of them each time. Memory: some pieces,
    the kept entries, the result. Raises as ``ops.select_topk`` does.
    """
    dtypes = {source.entries[name].dtype for name in names}
    if len(dtypes) > 1 or not dtypes <= set(_checks.FLOATS):
        raise TypeError(
            f"scores must have one dtype of {_checks.FLOATS}; got {sorted(map(str, dtypes))} in {source.path}"
        )
    dtype = dtypes.pop() if dtypes else torch.float32
    kernels = _backends.resolve(backend, torch.device("cpu"), ("reference", "cpu"))
    scores = _Scores(source, names, dtype, kernels)
    check_options(k, scores.total, nan)
    return _by_sample(scores, k, nan) or _by_counts(scores, k, nan)


def _by_sample(scores: _Scores, k: int, nan: str) -> tuple[list[Bits], float] | None:
    """By a single read; None where a sample says that this would keep too much, or has misled."""
    bracket = _guess(scores, k)
    found = bracket and _marked(scores, *bracket, nan)
    if not found:
        return None
    parts = list(itertools.chain(*found))
    needed = k - sum(part.above for part in parts)
    return _finish(scores, found, needed) if 0 < needed <= sum(part.within for part in parts) else None


def _by_counts(scores: _Scores, k: int, nan: str) -> tuple[list[Bits], float]:
    """By reads that count keys, and one that marks."""
    low, high, needed = _radix.bracket(scores.histogram, scores.dtype, k, _KEPT)
    equal = high - low == 1  # however many these are: the first are taken as they come
    found = _marked(scores, low, high, nan, needed if equal else None)
    assert found is not None  # the bracket does not hold more
    valid = scores.total - sum(part.nans for part in itertools.chain(*found))
    if k > valid:
        raise ValueError(f"k must be at most {valid}, the number of scores that are not NaN; got {k}")
    if needed and not equal:
        return _finish(scores, found, needed)
    picks = [_picks.join([(part.bits, part.numel) for part in parts]) for parts in found]
    return picks, _radix.score_of(low, scores.dtype)


def _guess(scores: _Scores, k: int) -> tuple[int, int] | None:
    """Keys ``[low, high)`` among which that of the k-th largest score probably is, from windows all over the tensors.

    Neighbours are alike, so that a window is one observation: the variance of its counts over the windows gives that
    of a sampled rank (cluster sampling: Cochran, "Sampling Techniques", 1977, chapter 9).
    """
    if scores.total < _SAMPLED or not 0 < k < scores.total:
        return None
    ends = list(itertools.accumulate(scores.numel[name] for name in scores.names))
    edges = np.linspace(0, scores.total, _WINDOWS + 1).astype(np.int64)
    windows = []
    for flat in np.random.default_rng(0).integers(edges[:-1], edges[1:]).tolist():
        which = bisect.bisect_right(ends, flat)
        numel = scores.numel[scores.names[which]]
        begin = max(min(flat - ends[which] + numel, numel - _WINDOW), 0)
        windows.append(_read(scores.source, _Job(scores.names[which], begin, min(begin + _WINDOW, numel))).clone())
    drawn = _radix.keys(torch.cat(windows)).numpy()
    ordered = drawn.copy()

    def largest(rank: int) -> int:  # the first is of rank 0
        ordered.partition(len(drawn) - 1 - rank)
        return int(ordered[len(drawn) - 1 - rank])

    rank = k / scores.total * len(drawn)
    starts = [0, *itertools.accumulate(len(window) for window in windows[:-1])]
    counts = np.add.reduceat(drawn >= largest(int(rank)), starts, dtype=np.int64)
    margin = _SIGMAS * math.sqrt(len(windows) * np.var(counts)) + 2 * _SIGMAS**2  # the last: for few that are above
    first, last = int(rank - margin), int(rank + margin)
    low = max(largest(last), 0) if last < len(drawn) else 0
    high = largest(first) + 1 if first >= 0 else _radix.top(scores.dtype) + 1
    share = np.count_nonzero((drawn >= low) & (drawn < high)) / len(drawn)
    return (low, high) if share * scores.total < 0.8 * _KEPT else None


def _marked(scores: _Scores, low: int, high: int, nan: str, ties: int | None = None) -> list[list[_Part]] | None:
    """One read: what the pieces of each tensor hold; None where more than ``_KEPT`` entries would be kept.

    ``ties``: so many of the entries inside the bracket are taken, the first ones, and none is kept.

    Raises:
        ValueError: NaN or negative scores.
    """
    kept, found = 0, []
    jobs = _jobs(scores.source, scores.names)
    marked = in_order(functools.partial(scores.mark, low, high, ties is None), jobs)
    for name in scores.names:
        parts: list[_Part] = []
        for part in itertools.islice(marked, -(-scores.numel[name] // PIECE)):
            if ties:
                taken = _picks.to_indices(part.inside, part.numel)[:ties]
                part, ties = part._replace(bits=part.also(taken)), ties - len(taken)
            if ties is not None:
                part = part._replace(inside=torch.empty(0, dtype=torch.uint8))  # nothing asks for it again
            parts.append(part)
            kept += len(part.values)
            if kept > _KEPT:
                return None
        where = f"scores[{name!r}], shape {scores.source.entries[name].shape}"
        bad = sum(part.nans for part in parts), sum(part.negatives for part in parts)
        if message := invalid(*bad, nan == "skip", scores.numel[name], where):
            raise ValueError(message)
        found.append(parts)
    return found


def _finish(scores: _Scores, found: list[list[_Part]], needed: int) -> tuple[list[Bits], float]:
    """With the ``needed`` largest of the kept entries, ties to the first; and the threshold."""
    parts = list(itertools.chain(*found))
    values = [part.values for part in parts]

    def histogram(low: int, shift: int, count: int) -> Tensor:
        some = (values[i : i + _TOGETHER] for i in range(0, len(values), _TOGETHER))
        return _total(count, in_order(lambda pieces: scores.count(pieces, low, shift, count), some))

    threshold, _, ties = _radix.bracket(histogram, scores.dtype, needed)
    equal = in_order(lambda piece: int(scores.count([piece], threshold, 0, 1)), values)
    left = [max(ties - before, 0) for before in itertools.accumulate(equal, initial=0)]
    bits = in_order(lambda job: scores.settle(job[0], threshold, job[1]), zip(parts, left[:-1], strict=True))
    picks = [_picks.join([(next(bits), part.numel) for part in parts]) for parts in found]
    return picks, _radix.score_of(threshold, scores.dtype)


def _total(count: int, histograms: Iterable[Tensor]) -> Tensor:
    bins = torch.zeros(count, dtype=torch.int64)
    for found in histograms:
        bins += found
    return bins


def _jobs(source: Checkpoint, names: Iterable[str]) -> Iterator[_Job]:
    """All pieces of the named tensors, in order."""
    for name in names:
        numel = math.prod(source.entries[name].shape)
        for begin in range(0, numel, PIECE):
            yield _Job(name, begin, min(begin + PIECE, numel))


_own = threading.local()


def _read(source: Checkpoint, job: _Job) -> Tensor:
    """The piece, in memory that this thread's next one takes."""
    if not hasattr(_own, "memory"):
        _own.memory = Memory(1)
    (piece,) = source.pieces(job.name, job.end - job.begin, begin=job.begin, end=job.end, memory=_own.memory)
    return piece


def positive(source: Checkpoint, names: Sequence[str]) -> int:
    """How many scores are above 0."""
    return sum(in_order(lambda job: int((_read(source, job) > 0).sum()), _jobs(source, names)))


def _numbered(pieces: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each piece with the index of its first entry."""
    begin = 0
    for piece in pieces:
        yield begin, piece
        begin += len(piece)


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
