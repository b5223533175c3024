"""Selected entries of a list of tensors: put back to initial values, gathered, scattered."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from cwfast import _backends, _checks, reference
from cwfast.ops import _rewind_direct
from cwfast.ops import _rewind_moves as _moves
from cwfast.ops._library import register
from cwfast.ops._rewind_moves import BACKENDS, picks_of
from cwfast.ops.select import packed_bytes

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
        backend: "reference", "cpu", "triton", "cuda" or "auto".

    Returns:
        ``weights``.

    Raises:
        TypeError, ValueError: an argument does not hold what is written above; nothing has been changed.
        BackendUnavailable: the named backend cannot run here.
    """
    if backend in ("auto", "cpu") and _rewind_direct.write(weights, initial, bits, compact=False):
        return weights
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
    if backend in ("auto", "cpu") and _rewind_direct.write(weights, values, bits, compact=True):
        return weights
    tensors = _writable("weights", weights)
    compact = _checks.tensors("values", values)
    _same_length(len(tensors), bits=len(bits), values=len(compact))
    resolved, packed, offsets = _resolve(tensors, bits, backend)
    for i, (weight, value) in enumerate(zip(tensors, compact, strict=True)):
        _checks.tensor(f"values[{i}]", value, dtypes=(weight.dtype,), ndim=(1,))
        _checks.same_device(weight.device, **{f"values[{i}]": value})
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
    """The backend, and the bits as the op takes them, which checks what is in them: bits or low, and offset or None."""
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
        packed.append(_aligned(low))
        offsets.append(None if offset is None else offset.contiguous())
    resolved = _backends.resolve(backend, weights[0].device if weights else torch.device("cpu"), BACKENDS)
    return resolved, packed, offsets


def _aligned(low: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 8 bytes: kernels read packed bits as words."""
    low = low.contiguous()
    return low.clone() if low.data_ptr() % 8 and low.dtype == torch.uint8 else low


def _run_rewind(
    weights: list[Tensor], initial: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None], backend: str
) -> None:
    picks = picks_of(weights, packed, offsets)
    _moves.survey(picks, backend, count=False)
    _moves.rewind(weights, initial, picks, backend)


def _run_gather(
    weights: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None], backend: str
) -> list[Tensor]:
    picks = picks_of(weights, packed, offsets)
    return _moves.gather(weights, picks, _moves.survey(picks, backend), backend)


def _run_scatter(
    weights: list[Tensor], packed: list[Tensor], offsets: list[Tensor | None], values: list[Tensor], backend: str
) -> None:
    picks = picks_of(weights, packed, offsets)
    surveyed = _moves.survey(picks, backend)
    for i, (count, value) in enumerate(zip(surveyed.counts, values, strict=True)):
        if len(value) != count:
            raise ValueError(f"values[{i}] must have {count} entries, one per selected entry; got {len(value)}")
    _moves.scatter(weights, picks, [value.contiguous() for value in values], surveyed, backend)


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
