"""A bare parameter that meets a batch: ``w * x``, ``x + w``, ``w.expand(B, ...)``: RMSNorm variants, LayerScale,
position embeddings, class tokens. And what changes a parameter without changing its gradient: a cast, ``1 + w``.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from cwfast.layers import Tracker, register
from cwfast.layers.pieces import PerSample, Piece
from cwfast.layers.samples import Layout
from cwfast.layers.scored import scored


def reduced(layout: Layout, grad: Tensor, shape: torch.Size) -> PerSample:
    """Each sample's gradient of a parameter of this shape that was broadcast to the shape of ``grad``."""
    inner = list(shape)
    while inner and inner[0] == 1:
        inner.pop(0)
    lead = grad.ndim - len(inner)
    if lead < 1:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} must be the same for all samples where it meets a tensor of shape "
            f"{tuple(grad.shape)}; its first dimension is that of the samples"
        )
    repeated = [lead + i for i, size in enumerate(inner) if size == 1 and grad.shape[lead + i] != 1]
    if repeated:
        grad = grad.sum(dim=repeated, keepdim=True)
    sums = layout.sums(grad.reshape(*grad.shape[:lead], math.prod(grad.shape[lead:])))
    return PerSample(sums.reshape(len(sums), *shape))


def added(layout: Layout, x: Tensor | None, grad: Tensor, weight: Tensor) -> Piece:
    return reduced(layout, grad, weight.shape)


def multiplied(layout: Layout, x: Tensor, grad: Tensor, weight: Tensor) -> Piece:
    return reduced(layout, grad * x, weight.shape)


def _meets_a_batch(x: Tensor, weight: Tensor) -> bool:
    """Whether x has a dimension before those of the weight: that of the samples."""
    own = list(weight.shape)
    while own and own[0] == 1:
        own.pop(0)
    return max(x.ndim, weight.ndim) > len(own) and x.ndim >= weight.ndim


def _sum_to(grad: Tensor, x: Tensor) -> Tensor:
    return grad.sum_to_size(x.shape)


@register(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def mul(tracker: Tracker, input: Any, other: Any) -> Any:
    """Scores ``w * x`` and ``x * w``."""
    x, weight = (input, other) if tracker.tracks(other) else (other, input)
    if not isinstance(x, Tensor) or tracker.tracks(x) or tracker.shared(x) or not _meets_a_batch(x, weight):
        return NotImplemented
    return scored(
        tracker,
        torch.mul,
        x,
        (weight,),
        (multiplied,),
        input_gradient=lambda x, grad, weight: _sum_to(grad * weight.to(grad.dtype), x),
    )


@register(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(tracker: Tracker, input: Any, other: Any, *, alpha: float = 1) -> Any:
    """Scores ``x + w``; ``1 + w`` is w to its gradient."""
    x, weight = (input, other) if tracker.tracks(other) else (other, input)
    if alpha != 1 or tracker.tracks(x):
        return NotImplemented
    if not isinstance(x, Tensor) or (x.ndim == 0 and not x.requires_grad):
        return tracker.alias(torch.add(input, other), weight)
    if tracker.shared(x) or not _meets_a_batch(x, weight):
        return NotImplemented
    return scored(tracker, torch.add, x, (weight,), (added,), input_gradient=lambda x, grad, weight: _sum_to(grad, x))


@register(Tensor.__iadd__, Tensor.add_)
def add_(tracker: Tracker, input: Tensor, other: Any, *, alpha: float = 1) -> Any:
    """Scores ``x += w``."""
    if tracker.tracks(input) or alpha != 1 or not tracker.tracks(other):
        return NotImplemented
    return input.copy_(add(tracker, input.clone(), other))


@register(Tensor.expand, Tensor.expand_as)
def expand(tracker: Tracker, input: Tensor, *sizes: Any) -> Any:
    """Scores ``w.expand(B, ...)`` and ``w.repeat(B, 1, ...)``: class tokens, prompts."""
    if not tracker.tracks(input):
        return NotImplemented
    sizes = (sizes[0].shape,) if len(sizes) == 1 and isinstance(sizes[0], Tensor) else sizes
    shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    return NotImplemented if len(shape) < input.ndim else _expanded(tracker, input, shape, repeat=False)


@register(Tensor.repeat)
def repeat(tracker: Tracker, input: Tensor, *sizes: Any) -> Any:
    """Scores ``w.repeat(B, 1, ...)`` where each repeated dimension has one entry."""
    shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    own = (1,) * (len(shape) - input.ndim) + tuple(input.shape)
    if any(times != 1 and size != 1 for times, size in zip(shape, own, strict=True)):
        return NotImplemented
    return _expanded(tracker, input, shape, repeat=True)


def _expanded(tracker: Tracker, input: Tensor, shape: tuple[int, ...], repeat: bool) -> Any:
    if len(shape) <= tracker.dim or shape[tracker.dim] != tracker.batch_now.size:
        return NotImplemented
    return scored(tracker, lambda _, w: w.repeat(shape) if repeat else w.expand(shape), None, (input,), (added,))


def _cast(function: Any, tracker: Tracker, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not tracker.tracks(input):
        return NotImplemented
    result = function(input, *args, **kwargs)
    return result if result is input else tracker.alias(result, input)


for _function in (
    *(Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
    *(Tensor.type_as, Tensor.type, Tensor.contiguous, Tensor.clone),
):
    register(_function)(functools.partial(_cast, _function))
