"""What rewind_, gather and scatter_ do on each backend once shapes, dtypes and devices are known to be right.

``survey`` reads all picks, once; the moves rely on its answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cwfast import _backends, reference
from cwfast.ops import _rewind_device
from cwfast.ops._library import written
from cwfast.ops._rewind_device import Picks, Survey, by_size

BACKENDS = ("reference", "cpu", "triton", "cuda")
_DEVICE_BACKENDS = ("triton", "cuda")


def picks_of(weights: Sequence[Tensor], packed: Sequence[Tensor], offsets: Sequence[Tensor | None]) -> list[Picks]:
    """As the ops take them: packed bits or low, and offset or None."""
    return [Picks(w.numel(), low, offset) for w, low, offset in zip(weights, packed, offsets, strict=True)]


def survey(picks: Sequence[Picks], backend: str, *, count: bool = True) -> Survey:
    """Checks the picks, whose dtypes and shapes are right, and counts them.

    Raises:
        ValueError: "bits[i] must ...": they do not name entries of tensor i, each once.
    """
    if backend in _DEVICE_BACKENDS:
        return _rewind_device.survey(picks, backend, count)
    i, wrong = wrong_picks(picks, backend)
    if wrong:
        raise ValueError(f"bits[{i}] {wrong}")
    return Survey(_counts(picks, backend) if count else [], [None] * len(picks))


def wrong_picks(picks: Sequence[Picks], backend: str) -> tuple[int, str]:
    """On the CPU: the first tensor whose picks do not name entries of it, each once, and what is wrong: "must ...".

    -1 and "" where all are right.
    """
    if backend == "cpu":
        return _backends.native().check_picks([pointers(p) for p in picks])
    for i, pick in enumerate(picks):
        if wrong := _reference_wrong(*pick):
            return i, wrong
    return -1, ""


def rewind(weights: Sequence[Tensor], initial: Sequence[Tensor], picks: Sequence[Picks], backend: str) -> None:
    """``weights[t][i] = initial[t][i]`` for the selected entries i."""
    try:
        if backend == "cpu":
            native = _backends.native()
            for size, which in by_size(weights).items():
                to, given = _views(weights, which), _views(initial, which)
                native.rewind(to, given, [pointers(picks[i]) for i in which], size)
        elif backend in _DEVICE_BACKENDS:
            _rewind_device.move(weights, initial, picks, backend)
        else:
            for weight, other, pick in zip(weights, initial, picks, strict=True):
                reference.rewind_(weight, other, _indices(pick))
    finally:  # also after Ctrl-C, which leaves some entries written
        written(weights)


def gather(weights: Sequence[Tensor], picks: Sequence[Picks], surveyed: Survey, backend: str) -> list[Tensor]:
    """The selected entries of each tensor, compact."""
    if backend == "reference":
        return [reference.gather(weight, _indices(pick)) for weight, pick in zip(weights, picks, strict=True)]
    values = [weight.new_empty(count) for count, weight in zip(surveyed.counts, weights, strict=True)]
    if backend in _DEVICE_BACKENDS:
        _rewind_device.move(values, weights, picks, backend, compact="targets", ranks=surveyed.ranks)
        return values
    for size, which in by_size(weights).items():
        to = [values[i].data_ptr() for i in which]
        _backends.native().gather(_views(weights, which), [pointers(picks[i]) for i in which], to, size)
    return values


def scatter(
    weights: Sequence[Tensor], picks: Sequence[Picks], values: Sequence[Tensor], surveyed: Survey, backend: str
) -> None:
    """What ``gather`` gave back into the selected entries; ``values`` are contiguous."""
    try:
        if backend == "cpu":
            native = _backends.native()
            for size, which in by_size(weights).items():
                given = [values[i].data_ptr() for i in which]
                native.scatter(_views(weights, which), [pointers(picks[i]) for i in which], given, size)
        elif backend in _DEVICE_BACKENDS:
            _rewind_device.move(weights, values, picks, backend, compact="sources", ranks=surveyed.ranks)
        else:
            for weight, pick, value in zip(weights, picks, values, strict=True):
                reference.scatter_(weight, _indices(pick), value)
    finally:  # also after Ctrl-C, which leaves some entries written
        written(weights)


def pointers(pick: Picks) -> tuple[int, int, int, int, int]:
    """(numel, bits, low, offset, k) with a null pointer for what is not there, as cwfast._C takes picks."""
    numel, low, offset = pick
    if offset is None:
        return numel, low.data_ptr(), 0, 0, 0
    return numel, 0, low.data_ptr(), offset.data_ptr(), len(low)


def _views(tensors: Sequence[Tensor], which: Sequence[int]) -> list[tuple[int, Sequence[int], Sequence[int]]]:
    """(data, sizes, strides), the last two empty where the tensor is contiguous."""
    found: list[tuple[int, Sequence[int], Sequence[int]]] = []
    for i in which:
        tensor = tensors[i]
        layout = ((), ()) if tensor.is_contiguous() else (tensor.shape, tensor.stride())
        found.append((tensor.data_ptr(), *layout))
    return found


def _indices(pick: Picks) -> Tensor:
    return reference.indices_of(pick.low, pick.offset, pick.numel)


def _counts(picks: Sequence[Picks], backend: str) -> list[int]:
    if all(p.offset is not None for p in picks):
        return [len(p.low) for p in picks]
    if backend == "cpu":
        return _backends.native().count_picks([pointers(p) for p in picks])
    return [len(p.low) if p.offset is not None else int(reference.unpack(p.low, p.numel).sum()) for p in picks]


def _reference_wrong(numel: int, low: Tensor, offset: Tensor | None) -> str:
    if offset is None:
        last = low[-8:]
        if reference.unpack(last, 64)[numel - (len(low) - len(last)) * 8 :].any():
            return f"must be zero past the last of {numel} entries; some bits are set"
        return ""
    if offset[0] != 0 or offset[-1] != len(low) or (offset.diff() < 0).any():
        return f"must have offsets from 0 to {len(low)}, the length of low, that do not decrease"
    position = low.to(torch.int32)
    falls = position[1:] <= position[:-1]
    inner = offset[(offset > 0) & (offset < len(low))]
    falls[inner - 1] = False  # from one block to the next
    last = position[int(offset[-2]) if numel else 0 :]
    if falls.any() or (last >= (numel - 1) % reference.BLOCK + 1).any():
        return f"must list positions that ascend strictly inside each block and stay below {numel} entries"
    return ""
