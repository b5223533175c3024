"""What every attack checks of its arrays, in words that name the argument; signals come out as float64."""

import math
import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.ArrayLike | torch.Tensor
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_FARTHEST = math.log(1e45)  # where LiRA's released code ends phi: 1e-45 is its least probability


def to_numpy(name: str, value: Array, kinds: str) -> npt.NDArray[Any]:
    """``value`` as a numpy array, of a dtype whose kind ("b" bool, "iu" integer, "f" float) is in ``kinds``.

    Where "f" is among them, the result is float64. ``name`` is the argument, for the message.

    Raises:
        TypeError: another dtype.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
    array = np.asarray(value)
    if array.dtype.kind not in kinds:
        expected = {"b": "bool", "iu": "an integer dtype", "f": "a floating-point dtype"}.get(kinds, "a real dtype")
        raise TypeError(f"{name} must have {expected}; got {array.dtype}")
    return array.astype(np.float64, copy=False) if "f" in kinds else array


def signal(name: str, value: Array) -> Floats:
    """A signal as float64 [Q, K, N], each query a block of its own; infinite values are values like others."""
    array = to_numpy(name, value, "f")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"{name} must have shape [K, N] or [K, N, Q], none of them 0; got {array.shape}")
    missing = int(np.isnan(array).sum())
    if missing:
        raise ValueError(f"{name} must hold no NaN; got {missing} of {array.size} values")
    return np.ascontiguousarray(np.moveaxis(np.atleast_3d(array), 2, 0))


def phi(value: Array) -> Floats:
    """phi as float64 [Q, K, N]: of an infinite one (a probability of 0 or 1) the farthest of all, at least 103.6.

    No mean or deviation could be taken of infinities.
    """
    values = signal("phi", value)
    infinite = np.isinf(values)
    if infinite.any():
        farthest = max(_FARTHEST, float(np.abs(values).max(where=~infinite, initial=0)))
        values = np.where(infinite, np.copysign(farthest, values), values)
    return values


def difference(a: Floats, b: Floats) -> Floats:
    """a - b, and 0 where both are the same infinity: neither is likelier."""
    with np.errstate(invalid="ignore"):
        return settled(a - b)


def settled(x: Floats) -> Floats:
    """x, and 0 where infinities have met."""
    return np.where(np.isnan(x), 0, x)


def logprob(value: Array) -> Floats:
    """Log-probabilities as float64 [Q, K, N]."""
    values = signal("logprob", value)
    if values.max() > 1e-3:  # a log-softmax may exceed 0 by rounding; a loss given by mistake would flip every score
        raise ValueError(f"logprob must be at most 0 (the negative of a loss); got a maximum of {values.max():g}")
    return values


def membership(value: Array, signals: Floats) -> Bools:
    """Membership [K, N] of signals [Q, K, N]."""
    member = to_numpy("membership", value, "b")
    if member.shape != signals.shape[1:]:
        raise ValueError(f"membership must have shape [K, N] = {signals.shape[1:]}; got {member.shape}")
    return member


def targets(target: int | None, signals: Floats) -> list[int]:
    """The rows to attack."""
    models = signals.shape[1]
    if target is None:
        return list(range(models))
    if isinstance(target, bool):
        raise TypeError(f"target must be an integer or None; got {target}")
    try:
        chosen = operator.index(target)
    except TypeError:
        raise TypeError(f"target must be an integer or None; got {type(target).__name__}") from None
    if not 0 <= chosen < models:
        raise ValueError(f"target must lie in [0, {models}); got {chosen}")
    return [chosen]


def population(value: Array | None, samples: int) -> Bools:
    """[N], which samples are in it."""
    pool = np.ones(samples, bool)
    if value is None:
        return pool
    index = to_numpy("population", value, "iu")
    if index.ndim != 1:
        raise ValueError(f"population must be one-dimensional; got shape {index.shape}")
    if index.size and not 0 <= index.min() <= index.max() < samples:
        raise ValueError(f"population must hold indices in [0, {samples}); got {index.min()} to {index.max()}")
    if np.unique(index).size != index.size:
        raise ValueError(f"population must hold distinct indices; got {index.size - np.unique(index).size} repeats")
    pool[:] = False
    pool[index] = True
    return pool


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises where an option is not one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def crowds(pool: Bools, member: Bools, rows: list[int]) -> Bools:
    """[targets, N]: the non-members of each target in the population."""
    result = pool & ~member[rows]
    for target, crowd in zip(rows, result, strict=True):
        size = int(np.count_nonzero(crowd))
        if size < 2:
            raise ValueError(f"population must hold at least 2 non-members of target {target}; got {size}")
    return result
