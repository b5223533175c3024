"""Selected entries of a list of tensors: put back to initial values, gathered, scattered."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from cwfast import _backends, _checks, reference
from cwfast.ops._library import register, written
from cwfast.ops.select import packed_bytes

BACKENDS = ("reference", "cpu")
Bits: TypeAlias = Tensor | tuple[Tensor, Tensor]


def rewind_(
    weights: Sequence[Tensor], initial: Sequence[Tensor], bits: Sequence[Bits], *, backend: str = "auto"
) -> Sequence[Tensor]:
    """``weights[t][i] = initial[t][i]`` for every selected entry i of every tensor t; the others are not touched.

    Args:
        weights: tensors of any shape and dtype of 1, 2, 4 or 8 bytes an entry, one device; changed in place; dense in
            any memory format. The flat index i is the logical (row-major) one.
        initial: as ``weights`` in number, shapes, dtypes and device; any strides.
        bits: for each weight, packed bits (``Selection.bits``), or ``(low, offset)``: ``low`` uint16 ``[k]``, the
            entries' positions inside blocks of 65,536 entries, ascending in each; ``offset`` int64 ``[blocks + 1]``
            from 0 to k, where each block's positions begin.
        backend: "reference", "cpu" or "auto".

    Returns:
        ``weights``.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above; nothing has been changed.
        BackendUnavailable: the named backend cannot run here.
    """
    tensors = _writable("weights", weights)
    others = _checks.tensors("initial", initial)
    _same_length(len(tensors), initial=len(others), bits=len(bits))
    for i, (weight, other) in enumerate(zip(tensors, others, strict=True)):
        _checks.tensor(f"initial[{i}]", other, dtypes=(weight.dtype,))
        _checks.shape(f"initial[{i}]", other, weight.shape, f"that of weights[{i}]")
        _checks.same_device(weight.device, **{f"initial[{i}]": other})
    resolved, packed, offsets = _resolve(tensors, bits, backend)
    if tensors:
        torch.ops.cwfast.rewind_(_detached(tensors), _detached(others), packed, offsets, resolved)
    return weights


def gather(weights: Sequence[Tensor], bits: Sequence[Bits], *, backend: str = "auto") -> list[Tensor]:
    """The selected entries of each tensor: one 1-D tensor per weight, in flat order. Arguments as in ``rewind_``.

    Weights may have any strides. Raises as ``rewind_`` does.
    """
    tensors = _checks.tensors("weights", weights)
    _same_length(len(tensors), bits=len(bits))
    resolved, packed, offsets = _resolve(tensors, bits, backend)
    return torch.ops.cwfast.gather(_detached(tensors), packed, offsets, resolved) if tensors else []


def scatter_(
    weights: Sequence[Tensor], bits: Sequence[Bits], values: Sequence[Tensor], *, backend: str = "auto"
) -> Sequence[Tensor]:
    """Write what ``gather`` gave back into the selected entries. Arguments as in ``rewind_``.

    ``values[t]`` is 1-D, of the dtype of ``weights[t]``, with one entry per selected one. Raises as ``rewind_`` does,
    before anything is written.
    """
    tensors = _writable("weights", weights)
    compact = _checks.tensors("values", values)
    _same_length(len(tensors), bits=len(bits), values=len(compact))
    resolved, packed, offsets = _resolve(tensors, bits, backend)
    for i, (weight, value) in enumerate(zip(tensors, compact, strict=True)):
        _checks.tensor(f"values[{i}]", value, dtypes=(weight.dtype,), ndim=(1,))
        _checks.same_device(weight.device, **{f"values[{i}]": value})
    for i, (count, value) in enumerate(zip(_counts(tensors, packed, offsets, resolved), compact, strict=True)):
        if len(value) != count:
            raise ValueError(f"values[{i}] must have {count} entries, one per selected entry; got {len(value)}")
    if tensors:
        torch.ops.cwfast.scatter_(_detached(tensors), packed, offsets, _detached(compact), resolved)
    return weights


def _writable(name: str, value: Sequence[Tensor]) -> list[Tensor]:
    tensors = _checks.tensors(name, value)
    for i, tensor in enumerate(tensors):
        _checks.written(f"{name}[{i}]", tensor)
    return tensors


def _same_length(expected: int, **lengths: int) -> None:
    for name, length in lengths.items():
        if length != expected:
            raise ValueError(f"{name} must have {expected} items, one per weight; got {length}")


def _detached(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def _resolve(
    weights: list[Tensor], bits: Sequence[Bits], backend: str
) -> tuple[str, list[Tensor], list[Tensor | None]]:
    """The backend, and the checked bits as the op takes them: bits or low, and offset or None."""
    packed: list[Tensor] = []
    offsets: list[Tensor | None] = []
    for i, (weight, item) in enumerate(zip(weights, bits, strict=True)):
        if weight.element_size() not in (1, 2, 4, 8):
            raise TypeError(f"weights[{i}] must have entries of 1, 2, 4 or 8 bytes; got {weight.dtype}")
        low, offset = item if isinstance(item, tuple) else (item, None)
        if offset is None:
            _checks.tensor(f"bits[{i}]", low, dtypes=(torch.uint8,), ndim=(1,))
            _checks.shape(
                f"bits[{i}]", low, (packed_bytes(weight.numel()),), f"1 bit for each of {weight.numel()} entries"
            )
        else:
            blocks = -(-weight.numel() // reference.BLOCK)
            _checks.tensor(f"bits[{i}][0] (low)", low, dtypes=(torch.uint16,), ndim=(1,))
            _checks.tensor(f"bits[{i}][1] (offset)", offset, dtypes=(torch.int64,), ndim=(1,))
            _checks.shape(
                f"bits[{i}][1] (offset)", offset, (blocks + 1,), f"the blocks of {weight.numel()} entries, + 1"
            )
        _checks.same_device(weight.device, **{f"bits[{i}]": low, f"bits[{i}][1]": offset})
        packed.append(low.contiguous())
        offsets.append(None if offset is None else offset.contiguous())
    resolved = _backends.resolve(backend, weights[0].device if weights else torch.device("cpu"), BACKENDS)
    wrong = _wrong_picks(weights, packed, offsets, resolved)
    if wrong:
        raise ValueError(wrong)
    return resolved, packed, offsets


def _wrong_picks(weights: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None], backend: str) -> str:
    """Empty where every pick names an entry of its weight, each once; else what is wrong."""
    if backend == "cpu":
        return _backends.native().check_picks(_picks(weights, packed, offsets))
    for i, (weight, low, offset) in enumerate(zip(weights, packed, offsets, strict=True)):
        if offset is None:
            padding = reference.unpack(low, len(low) * 8)[weight.numel() :]
            if padding.any():
                return f"bits[{i}]: bits past the last of {weight.numel()} entries must be zero; some are set"
            continue
        if offset[0] != 0 or offset[-1] != len(low) or (offset.diff() < 0).any():
            return f"bits[{i}]: offset must run from 0 to {len(low)}, the length of low, without decreasing"
        indices = reference.indices_of(low, offset, weight.numel())
        if (indices.diff() <= 0).any() or (indices >= weight.numel()).any():
            return f"bits[{i}]: low must ascend strictly inside each block and stay below {weight.numel()} entries"
    return ""


def _picks(weights: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None]) -> list[tuple[int, ...]]:
    """(numel, bits, low, offset, k) with a null pointer for what is not there."""
    return [
        (weight.numel(), low.data_ptr(), 0, 0, 0)
        if offset is None
        else (weight.numel(), 0, low.data_ptr(), offset.data_ptr(), len(low))
        for weight, low, offset in zip(weights, packed, offsets, strict=True)
    ]


def _views(tensors: list[Tensor]) -> list[tuple[int, list[int], list[int]]]:
    """(data, sizes, strides), the last two empty where the tensor is contiguous."""
    return [
        (t.data_ptr(), [], []) if t.is_contiguous() else (t.data_ptr(), list(t.shape), list(t.stride()))
        for t in tensors
    ]


def _counts(weights: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None], backend: str) -> list[int]:
    if backend == "cpu":
        return _backends.native().count_picks(_picks(weights, packed, offsets))
    return [
        len(low) if offset is not None else int(reference.unpack(low, weight.numel()).sum())
        for weight, low, offset in zip(weights, packed, offsets, strict=True)
    ]


def _by_size(weights: list[Tensor]) -> dict[int, list[int]]:
    """Which tensors have entries of which size: one kernel call serves one size."""
    groups: dict[int, list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault(weight.element_size(), []).append(i)
    return groups


def _run_rewind(
    weights: list[Tensor], initial: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None], backend: str
) -> None:
    if backend == "reference":
        for weight, other, low, offset in zip(weights, initial, packed, offsets, strict=True):
            reference.rewind_(weight, other, reference.indices_of(low, offset, weight.numel()))
        return
    picks, w, w0 = _picks(weights, packed, offsets), _views(weights), _views(initial)
    for size, which in _by_size(weights).items():
        _backends.native().rewind([w[i] for i in which], [w0[i] for i in which], [picks[i] for i in which], size)
    written(weights)


def _run_gather(
    weights: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None], backend: str
) -> list[Tensor]:
    if backend == "reference":
        items = zip(weights, packed, offsets, strict=True)
        return [reference.gather(w, reference.indices_of(low, offset, w.numel())) for w, low, offset in items]
    counts = _counts(weights, packed, offsets, backend)
    values = [torch.empty(count, dtype=weight.dtype) for count, weight in zip(counts, weights, strict=True)]
    picks, w = _picks(weights, packed, offsets), _views(weights)
    for size, which in _by_size(weights).items():
        pointers = [values[i].data_ptr() for i in which]
        _backends.native().gather([w[i] for i in which], [picks[i] for i in which], pointers, size)
    return values


def _run_scatter(
    weights: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None], values: list[Tensor], backend: str
) -> None:
    if backend == "reference":
        for weight, low, offset, value in zip(weights, packed, offsets, values, strict=True):
            reference.scatter_(weight, reference.indices_of(low, offset, weight.numel()), value)
        return
    values = [value.contiguous() for value in values]
    picks, w = _picks(weights, packed, offsets), _views(weights)
    for size, which in _by_size(weights).items():
        pointers = [values[i].data_ptr() for i in which]
        _backends.native().scatter([w[i] for i in which], [picks[i] for i in which], pointers, size)
    written(weights)


def _fake_gather(
    weights: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None], backend: str
) -> list[Tensor]:
    context = torch.library.get_ctx()
    return [weight.new_empty(context.new_dynamic_size()) for weight in weights]


register(
    "rewind_(Tensor(a!)[] weights, Tensor[] initial, Tensor[] bits, Tensor?[] offsets, str backend) -> ()",
    _run_rewind,
    lambda *args: None,
)
register(
    "gather(Tensor[] weights, Tensor[] bits, Tensor?[] offsets, str backend) -> Tensor[]", _run_gather, _fake_gather
)
register(
    "scatter_(Tensor(a!)[] weights, Tensor[] bits, Tensor?[] offsets, Tensor[] values, str backend) -> ()",
    _run_scatter,
    lambda *args: None,
)
