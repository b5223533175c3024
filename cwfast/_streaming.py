"""Select and gather over tensors on disk, read in bounded pieces: memory does not grow with the checkpoint."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cwfast import _checks, _picks, _radix, ops
from cwfast.checkpoint import Checkpoint
from cwfast.ops.rewind import Bits


def select_topk(scores: Checkpoint, names: Sequence[str], k: int, nan: str) -> tuple[list[Bits], float]:
    """``ops.select_topk`` of the named tensors, bit for bit: picks in the smaller form, and the threshold.

    Reads everything once per 16 bits of the dtype, and once more. Raises as ``ops.select_topk`` does.
    """
    dtypes = {scores.entries[name].dtype for name in names}
    if len(dtypes) > 1 or not dtypes <= set(_checks.FLOATS):
        raise TypeError(
            f"scores must have one dtype of {_checks.FLOATS}; got {sorted(map(str, dtypes))} in {scores.path}"
        )
    numel = {name: math.prod(scores.entries[name].shape) for name in names}
    if not 0 <= k <= sum(numel.values()):
        raise ValueError(f"k must lie between 0 and {sum(numel.values())}, the number of scores; got {k}")
    dtype = dtypes.pop() if dtypes else torch.float32
    nans = 0
    for name in names:
        bad = sum((_radix.check(piece, False) for piece in scores.pieces(name)), torch.zeros(2, dtype=torch.int64))
        nans += int(bad[0])
        if bad[1] or (bad[0] and nan == "raise"):
            raise ValueError(f"scores must not be NaN or negative; got {bad[0]} NaN and {bad[1]} negative in {name!r}")
    if k > sum(numel.values()) - nans:
        raise ValueError(f"k must be at most {sum(numel.values()) - nans}, the scores that are not NaN; got {k}")

    def pieces() -> Iterator[Tensor]:
        for name in names:
            for piece in scores.pieces(name):
                yield _radix.keys(piece)

    found = _radix.threshold(pieces, dtype.itemsize, k, lambda histogram: histogram)
    ties, picks = found.ties, []
    for name in names:
        parts = [torch.empty(0, dtype=torch.uint8)]
        for piece in scores.pieces(name):
            part, ties = _radix.mark(_radix.keys(piece), found.key, ties)
            parts.append(part)
        picks.append(_picks.compact(torch.cat(parts), numel[name]))
    return picks, _radix.score_of(found.key, dtype)


def positive(scores: Checkpoint, names: Sequence[str]) -> int:
    """How many scores are above 0."""
    return sum(int((piece > 0).sum()) for name in names for piece in scores.pieces(name))


def gather(source: Checkpoint, picks: Mapping[str, Bits], names: Mapping[str, str]) -> list[Tensor]:
    """The selected entries of tensors on disk, in their dtype on the CPU: everything is read once.

    Args:
        source: the file or folder.
        picks: of each tensor, on the CPU; one compact 1-D tensor comes back for each.
        names: what each is called in ``source``.
    """
    found = []
    for name, bits in picks.items():
        parts = [torch.empty(0, dtype=source.entries[names[name]].dtype)]
        if _picks.count(bits):
            begin = 0
            for piece in source.pieces(names[name]):
                parts += ops.gather([piece], [_picks.part(bits, begin, begin + len(piece))])
                begin += len(piece)
        found.append(torch.cat(parts))
    return found
