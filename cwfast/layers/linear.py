"""``y = x W^T + b`` and its kin: per sample, the weight's gradient is a sum of outer products."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cwfast._shards import features, is_sharded
from cwfast.layers import Tracker, register
from cwfast.layers.outer import Outer
from cwfast.layers.pieces import PerSample, Piece
from cwfast.layers.samples import Layout
from cwfast.layers.scored import scored


def outer(layout: Layout, x: Tensor, grad: Tensor, weight: Tensor) -> Piece:
    """Of W in ``y = x W^T``."""
    (inputs, offsets), (grads, _) = layout.by_sample(x), layout.by_sample(grad)
    return Outer(inputs, grads, offsets)


def turned(layout: Layout, x: Tensor, grad: Tensor, weight: Tensor) -> Piece:
    """Of W in ``y = x W``."""
    return outer(layout, grad, x, weight)


def bias(layout: Layout, x: Tensor | None, grad: Tensor, weight: Tensor) -> Piece:
    """Of b in ``y = ... + b``."""
    return PerSample(layout.sums(grad))


def _outer_of_shards(layout: Layout, x: Tensor, grad: Tensor, weight: Tensor) -> Piece:
    """Of this rank's part of W: each of its entries needs one feature of the input and one of the result."""
    return outer(layout, features(x, weight, 1), features(grad, weight, 0), weight)


def _bias_of_shards(layout: Layout, x: Tensor | None, grad: Tensor, weight: Tensor) -> Piece:
    return bias(layout, None, features(grad, weight, 0), weight)


def _backward(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return grad @ weight.to(grad.dtype)  # under autocast the gradient comes in a lower precision than the weight


def _backward_turned(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return grad @ weight.to(grad.dtype).T


@register(functional.linear, dtensors=True)
def linear(
    tracker: Tracker, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, owner: Tensor | None = None
) -> Any:
    """Scores ``torch.nn.functional.linear`` and so ``torch.nn.Linear``; of DTensors, this rank's part of W and b."""
    gradients = (_outer_of_shards, _bias_of_shards) if is_sharded(weight) else (outer, _bias)
    return scored(tracker, functional.linear, input, (weight, bias), gradients, input_gradient=_backward, owner=owner)


_bias = bias


@register(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(tracker: Tracker, input: Tensor, other: Tensor, *, owner: Tensor | None = None) -> Any:
    """Scores ``x @ W`` for a 2-D weight, as it is or transposed (``x @ w.t()``)."""
    if tracker.tracks(input) or other.ndim != 2 or input.ndim < 2:
        return NotImplemented
    return scored(tracker, torch.matmul, input, (other,), (turned,), input_gradient=_backward_turned, owner=owner)


@register(torch.addmm, Tensor.addmm)
def addmm(tracker: Tracker, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """Scores ``b + x W``, and so the Conv1D of transformers."""
    if tracker.tracks(mat1) or input.ndim != 1 or beta != 1 or alpha != 1:
        return NotImplemented
    return scored(
        tracker,
        lambda x, weight, bias: torch.addmm(bias, x, weight),
        mat1,
        (mat2, input),
        (turned, bias),
        input_gradient=_backward_turned,
    )


@register(torch.einsum)
def einsum(tracker: Tracker, equation: str, *operands: Tensor) -> Any:
    """Scores ``einsum("...i,oi->...o", x, w)`` and the like: two operands, w 2-D with one summed and one kept index."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) != 2 or "->" not in equation:
        return NotImplemented
    terms, result = equation.replace(" ", "").replace("...", ".").split("->")
    named = list(zip(terms.split(","), operands, strict=True))
    (x_term, x), (w_term, w) = named if tracker.tracks(operands[1]) else reversed(named)
    if tracker.tracks(x) or len(w_term) != 2 or "." in w_term or not result:
        return NotImplemented
    kept = result[-1]
    summed = w_term.replace(kept, "")
    if len(summed) != 1 or x_term != result[:-1] + summed or kept in x_term or len(set(x_term)) != len(x_term):
        return NotImplemented
    return linear(tracker, x, w) if w_term == kept + summed else matmul(tracker, x, w)
