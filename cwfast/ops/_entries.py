"""Selected entries that are written again and again: what ``scatter_`` checks at each call is checked once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cwfast import _backends
from cwfast.ops._library import written
from cwfast.ops.rewind import Bits, _picks, _pointers, _resolve, _views, _writable


class Entries:
    """The selected entries of tensors like ``like``.

    A call costs a few microseconds besides the entries, where ``scatter_`` takes 50 and more: a model of 100 tensors,
    each written as its gradient arrives, would wait longer for the checks than for the memory.

    Args:
        like: tensors of the shapes, dtypes and device that ``write`` will get.
        bits: as in ``cwfast.ops.scatter_``; not to be changed.
        names: what messages call the tensors.
        backend: see there.

    Raises:
        TypeError, ValueError, BackendUnavailable: as ``scatter_`` does.
    """

    def __init__(
        self, like: Sequence[Tensor], bits: Sequence[Bits], names: Sequence[str], *, backend: str = "auto"
    ) -> None:
        tensors = _writable("weights", like)
        self._backend, self._packed, self._offsets = _resolve(tensors, bits, backend)
        self._kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        self._names = list(names)
        self._sizes = sorted({tensor.element_size() for tensor in tensors})
        self._pointers = _pointers(_picks(tensors, self._packed, self._offsets))

    def write(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """``scatter_(tensors, bits, values)``.

        Args:
            tensors: strided; wherever they lie by now.
            values: contiguous, one entry per selected one, of each tensor's dtype and device; not checked.

        Raises:
            ValueError: a tensor has not kept its shape, dtype or device, or is not dense; nothing has been written.
        """
        for name, kind, tensor in zip(self._names, self._kinds, tensors, strict=True):
            if (tensor.shape, tensor.dtype, tensor.device) != kind:
                shape, dtype, device = kind
                raise ValueError(
                    f"{name} must stay a dense tensor of shape {tuple(shape)}, {dtype}, on {device}; "
                    f"got {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
                )
            if not tensor.is_contiguous():
                _writable(name, [tensor])
        if self._backend != "cpu":
            detached = [tensor.detach() for tensor in tensors]
            torch.ops.cwfast.scatter_(detached, self._packed, self._offsets, values, self._backend)
            return
        native, views = _backends.native(), _views(list(tensors))
        for size in self._sizes:
            which = [i for i, tensor in enumerate(tensors) if tensor.element_size() == size]
            given = [values[i].data_ptr() for i in which]
            native.scatter([views[i] for i in which], [self._pointers[i] for i in which], given, size)
        written(tensors)
