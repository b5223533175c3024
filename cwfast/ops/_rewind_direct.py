"""rewind_ and scatter_ of lists on the CPU, as most calls give them, without the layers that other calls need.

After a training step neither those layers nor their data are in any cache: checks one by one, dispatcher and survey
take a quarter of a millisecond, in which 20,000 entries are written. One look at each tensor and one call of the
kernel, which checks the lists, take a third of that.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cwfast import _backends, reference
from cwfast.ops._library import written

_PLAIN = (Tensor, nn.Parameter)
_LISTS = (list, tuple)


def write(weights: Sequence[Tensor], sources: Sequence[Tensor], bits: Sequence[Any], *, compact: bool) -> bool:
    """Whether it has been done; if not, nothing has, and it is for others to do it or to say what is wrong.

    Args:
        weights: as in ``rewind_`` and ``scatter_``; taken are contiguous ones of one dtype.
        sources: contiguous, of the same dtype: ``values`` where ``compact`` is true, else ``initial``.
        bits: lists.
        compact: see there.

    Raises:
        ValueError: "bits[i] must ...": a list does not name entries of its weight, each once; nothing has been written.
    """
    if is_compiling() or is_in_torch_dispatch_mode():
        return False  # who traces must see the op
    if not (isinstance(weights, _LISTS) and isinstance(sources, _LISTS) and isinstance(bits, _LISTS)):
        return False
    if not (len(weights) == len(sources) == len(bits) > 0 and type(weights[0]) in _PLAIN):
        return False
    native, dtype = _backends.extension(), weights[0].dtype
    if isinstance(native, str) or dtype.itemsize > 8:
        return False
    views, given, picks = [], [], []
    for weight, source, item in zip(weights, sources, bits, strict=True):
        if not (isinstance(item, tuple) and len(item) == 2):
            return False
        low, offset = item
        if not (_plain(weight, dtype) and _plain(source, dtype) and _plain(low, torch.uint16)):
            return False
        numel, k = weight.numel(), low.numel()
        if not (_plain(offset, torch.int64) and low.ndim == 1 and offset.shape == (-(-numel // reference.BLOCK) + 1,)):
            return False
        if source.shape != ((k,) if compact else weight.shape):
            return False
        views.append((weight.data_ptr(), (), ()))
        given.append(source.data_ptr())
        picks.append((numel, 0, low.data_ptr(), offset.data_ptr(), k))
    wrong = ""
    try:
        if compact:
            i, wrong = native.scatter(views, picks, given, dtype.itemsize, True)
        else:
            i, wrong = native.rewind(views, [(data, (), ()) for data in given], picks, dtype.itemsize, True)
    finally:  # also after Ctrl-C, which leaves some entries written
        if not wrong:
            written(weights)
    if wrong:
        raise ValueError(f"bits[{i}] {wrong}")
    return True


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    )
