"""Argument checks shared by the ops: each says what must hold, then what was given."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(
    name: str, value: object, *, dtypes: Sequence[torch.dtype] | None = None, ndim: Sequence[int] = ()
) -> Tensor:
    """``value`` as a strided tensor of an allowed dtype and number of dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor; got layout {value.layout}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {_list(dtypes)}; got {value.dtype}")
    if ndim and value.ndim not in ndim:
        raise ValueError(f"{name} must have {_list(ndim)} dimensions; got shape {tuple(value.shape)}")
    return value


def shape(name: str, value: Tensor, expected: Sequence[int], why: str) -> None:
    """``value`` has the shape ``expected``, which comes from ``why``."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({why}); got {tuple(value.shape)}")


def same_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Every tensor lies on ``device``."""
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(f"{name} must be on {device}, like the other tensors; got {value.device}")


def written(name: str, value: Tensor) -> None:
    """``value`` may be written in place: dense in some memory format, and no two of its entries share memory."""
    if not is_dense(value):
        raise ValueError(
            f"{name} is written in place and must be dense (some permutation of a contiguous tensor); "
            f"got shape {tuple(value.shape)} with strides {value.stride()}"
        )


def is_dense(value: Tensor) -> bool:
    """Whether the entries fill one block of memory without holes or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(value.stride(), value.shape, strict=True) if sz != 1):
        if stride != expected:
            return value.numel() == 0
        expected *= size
    return True


def tensors(name: str, value: object) -> list[Tensor]:
    """``value`` as a list of tensors on one device."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors; got {type(value).__name__}")
    found = [tensor(f"{name}[{i}]", item) for i, item in enumerate(value)]
    for i, item in enumerate(found):
        same_device(found[0].device, **{f"{name}[{i}]": item})
    return found


def _list(items: Sequence[object]) -> str:
    return " or ".join(str(item) for item in items)
