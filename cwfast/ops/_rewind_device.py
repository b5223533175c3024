"""rewind_, gather and scatter_ on devices: the table that the kernels of backends triton and cuda read, and launches.

Both backends have two kernels over a list of tensors: "survey" checks the picks and counts packed bits, "move" copies
the selected entries, once for each size of entry. The table has one row a tensor, so that its cost does not grow with
the tensors. Only what the caller must know waits for the device: whether picks are wrong, and how many they are. Both
come from one survey, which also says where the moves of packed bits find their compact values.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cwfast import _backends
from cwfast.reference import BLOCK

SLICES = 8  # of a block: their packed bits are counted apart
_WRONG = {  # CwfastWrongPicks of csrc/cuda/launchers.h
    1: "must be zero past the last of {numel} entries; some bits are set",
    2: "must have offsets from 0 to {k}, the length of low",
    4: "must have offsets that do not decrease",
    8: "must list positions that ascend strictly inside each block and stay below {numel} entries",
}


class Picks(NamedTuple):
    """The selected entries of one tensor: packed bits (offset None) or (low, offset); contiguous."""

    numel: int
    low: Tensor
    offset: Tensor | None


class Survey(NamedTuple):
    """What the picks of a list of tensors are.

    Attributes:
        counts: selected entries of each tensor; empty where nobody asked.
        ranks: of packed bits on a device, int64 ``[8 blocks and more]``: bits set before each slice, but for a
            constant; else None.
    """

    counts: Sequence[int]
    ranks: Sequence[Tensor | None]


def by_size(tensors: Sequence[Tensor]) -> dict[int, list[int]]:
    """Which tensors have entries of which size: one kernel call serves one size."""
    groups: dict[int, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.element_size(), []).append(i)
    return groups


def survey(picks: Sequence[Picks], backend: str, count: bool) -> Survey:
    """Checks the picks, whose shapes and dtypes are right, and counts them; waits for the device once.

    Raises:
        ValueError: "bits[i] must ...": they do not name entries of tensor i, each once.
    """
    if not picks:
        return Survey([], [])
    device = picks[0].low.device
    first = _first_blocks(picks)
    answer = torch.zeros(len(picks), dtype=torch.int32, device=device)
    counts = torch.empty(first[-1] * SLICES, dtype=torch.int64, device=device)
    table = _table([[*_row(p, begin), 0, *[0] * 6] for p, begin in zip(picks, first, strict=False)], device)
    if backend == "cuda":
        _backends.native().cuda_rewind_survey(
            table.data_ptr(), len(picks), first[-1], counts.data_ptr(), answer.data_ptr(), *_where(device)
        )
    else:
        with _current(device):
            _backends.triton_kernels("rewind").survey(table, len(picks), first[-1], counts, answer)
    before = torch.empty(0)
    if count and any(p.offset is None for p in picks):
        before = torch.zeros(len(counts) + 1, dtype=torch.int64, device=device)
        torch.cumsum(counts, 0, out=before[1:])
        answer = torch.cat([answer, before[torch.tensor(first) * SLICES]])
    answers = answer.tolist()
    for i, pick in enumerate(picks):
        if found := answers[i]:
            text = next(text for code, text in _WRONG.items() if found & code)
            raise ValueError(f"bits[{i}] {text.format(k=len(pick.low), numel=pick.numel)}")
    if not count:
        return Survey([], [])
    edges = answers[len(picks) :]
    counted, ranks = [], []
    for i, pick in enumerate(picks):
        packed = pick.offset is None
        counted.append(edges[i + 1] - edges[i] if packed else len(pick.low))
        ranks.append(before[first[i] * SLICES :] if packed else None)
    return Survey(counted, ranks)


def move(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    picks: Sequence[Picks],
    backend: str,
    compact: str = "",
    ranks: Sequence[Tensor | None] = (),
) -> None:
    """``target[i] = source[i]`` for the selected entries i. Launches; nothing is waited for.

    Args:
        targets: one for each of ``picks``; dense, or compact.
        sources: likewise; any strides, or compact.
        picks: of each tensor, checked.
        backend: "triton" or "cuda".
        compact: "targets" or "sources" hold the selected entries alone, in flat order.
        ranks: then, those of the survey.
    """
    if not targets:
        return
    device = targets[0].device
    for size, which in by_size(targets).items():
        first = _first_blocks([picks[i] for i in which])
        rows: list[list[int]] = []
        layouts: list[int] = []
        for i, begin in zip(which, first, strict=False):
            before = ranks[i] if ranks else None
            row = [*_row(picks[i], begin), 0 if before is None else before.data_ptr()]
            for name, tensor in (("targets", targets[i]), ("sources", sources[i])):
                dims = [] if name == compact else _layout(tensor)
                row += [tensor.data_ptr(), -1 if name == compact else len(dims) // 2, len(layouts)]
                layouts += dims
            rows.append(row)
        table = _table([*rows, layouts], device)
        if backend == "cuda":
            at = table.data_ptr()
            layouts_at = at + sum(map(len, rows)) * 8
            _backends.native().cuda_rewind_move(at, len(rows), first[-1], layouts_at, size, *_where(device))
        else:
            with _current(device):
                _backends.triton_kernels("rewind").move(table, len(rows), first[-1], size)


def _first_blocks(picks: Sequence[Picks]) -> list[int]:
    """Where each tensor's blocks begin, and the number of all; an empty tensor has a block too, so that it is seen."""
    first = [0]
    for p in picks:
        first.append(first[-1] + max(1, -(-p.numel // BLOCK)))
    return first


def _row(picks: Picks, first: int) -> list[int]:
    """The first columns of ``CwfastSelected`` in csrc/cuda/launchers.h."""
    offset = 0 if picks.offset is None else picks.offset.data_ptr()
    return [first, picks.numel, picks.low.data_ptr(), offset, len(picks.low)]


def _layout(tensor: Tensor) -> list[int]:
    """Size and stride of each dimension, the innermost first, those of one run of memory as one; contiguous: none."""
    if tensor.is_contiguous():
        return []
    dims: list[int] = []
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size == 1:
            continue
        if dims and stride == dims[-2] * dims[-1]:
            dims[-2] *= size
        else:
            dims += [size, stride]
    return dims


def _table(rows: list[list[int]], device: torch.device) -> Tensor:
    """One upload of pageable memory, which the driver copies away before it returns: no wait for the stream."""
    return torch.tensor([x for row in rows for x in row], dtype=torch.int64).to(device, non_blocking=True)


def _where(device: torch.device) -> tuple[int, int]:
    return device.index or 0, _backends.cuda_stream(device)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on torch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
