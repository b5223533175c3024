"""Selected entries that are written again and again: what ``scatter_`` checks at each call is checked once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cwfast import _checks
from cwfast.ops import _rewind_moves as _moves
from cwfast.ops._rewind_moves import Survey, picks_of
from cwfast.ops.rewind import Bits, _resolve


class Entries:
    """The selected entries of one tensor, checked once; a copy of them (2 bytes each as a list) that nobody else has.

    Were it the caller's own list, a change of it after the check would let the kernels write outside of the tensor.

    Args:
        name: what messages call the tensor.
        like: a tensor of the shape and device that will be written.
        bits: as in ``cwfast.ops.scatter_``.
        backend: see there.

    Attributes:
        backend: the resolved one.
        picks: the copy.
        count: how many entries are selected.
        ranks: what moves on devices need to know of packed bits.

    Raises:
        TypeError, ValueError, BackendUnavailable: as ``scatter_`` does.
    """

    def __init__(self, name: str, like: Tensor, bits: Bits, *, backend: str = "auto") -> None:
        _checks.written(name, like)
        self.name, self._shape, self._device = name, like.shape, like.device
        own: Bits = (bits[0].clone(), bits[1].clone()) if isinstance(bits, tuple) else bits.clone()
        try:
            self.backend, packed, offsets = _resolve([like], [own], backend)
            (self.picks,) = picks_of([like], packed, offsets)
            (self.count,), (self.ranks,) = _moves.survey([self.picks], self.backend)
        except (TypeError, ValueError) as error:  # the ops know places, not names
            message = str(error).replace("weights[0]", name).replace("bits[0]", f"bits of {name}")
            raise type(error)(message) from None

    def check(self, tensor: Tensor, dtype: torch.dtype | None = None, prefix: str = "") -> None:
        """``tensor`` may be written: it has kept shape and device, is dense, and of ``dtype`` where that is given.

        Raises:
            ValueError: it is not so; the message names ``prefix`` and the tensor.
        """
        dtype = dtype or tensor.dtype
        if (tensor.shape, tensor.dtype, tensor.device) != (self._shape, dtype, self._device):
            raise ValueError(
                f"{prefix}{self.name} must stay a dense tensor of shape {tuple(self._shape)}, {dtype}, on "
                f"{self._device}; got {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
            )
        if not tensor.is_contiguous():
            _checks.written(prefix + self.name, tensor)


def write(entries: Sequence[Entries], tensors: Sequence[Tensor], values: Sequence[Tensor], prefix: str = "") -> None:
    """``scatter_`` of tensors that may lie on several devices.

    On the CPU a call costs a few microseconds besides the entries, where ``scatter_`` takes 50 and more: a model of 100
    tensors, each written as its gradient arrives, would wait longer for the checks than for the memory.

    Args:
        entries: of each tensor.
        tensors: strided; wherever they lie by now.
        values: contiguous, one entry per selected one, of each tensor's dtype and device.
        prefix: what messages put before the tensors' names.

    Raises:
        ValueError: a tensor has not kept its shape, dtype or device, or is not dense; nothing has been written.
    """
    for entry, tensor, value in zip(entries, tensors, values, strict=True):
        entry.check(tensor, value.dtype, prefix)
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        _write_on_one([entries[i] for i in here], [tensors[i] for i in here], [values[i] for i in here])


def write_one(entry: Entries, tensor: Tensor, value: Tensor, prefix: str = "") -> None:
    """``write`` of one tensor, for what is called once for each parameter: between two of them, this is cold code."""
    entry.check(tensor, value.dtype, prefix)
    _write_on_one([entry], [tensor], [value])


def _write_on_one(entries: list[Entries], tensors: list[Tensor], values: list[Tensor]) -> None:
    surveyed = Survey([], [entry.ranks for entry in entries])
    _moves.scatter(tensors, [entry.picks for entry in entries], values, surveyed, entries[0].backend)
