"""Stacks of experts ``[E, O, I]`` that share one call: each expert is a linear layer of its own rows, or looked up."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cwfast.layers import Tracker, register
from cwfast.layers.linear import matmul
from cwfast.layers.pieces import Lookup, Piece
from cwfast.layers.rows import owner_of
from cwfast.layers.samples import Layout
from cwfast.layers.scored import scored, with_owner

_FUNCTIONS = [getattr(functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)]


@register(*(function for function in _FUNCTIONS if function is not None))
def grouped_mm(
    tracker: Tracker,
    input: Tensor,
    mat2: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Scores ``x[offs[e-1]:offs[e]] @ W[e]`` for all e, by one product each."""
    samples = tracker.batch_now.size
    plain = input.ndim == 2 and mat2.ndim == 3 and offs is not None and bias is None and out_dtype is None
    if not plain or tracker.tracks(input) or samples is None:
        return NotImplemented
    owner = owner_of(input, samples)
    if owner is None:
        raise ValueError(
            "the rows of grouped experts must be traced to their samples: their input must be picked by an index from "
            f"a tensor that carries a gradient; got an input of shape {tuple(input.shape)} made by {input.grad_fn}"
        )
    ends = offs.tolist()  # type: ignore[union-attr]
    with torch._C._EnableTorchFunction():
        experts = mat2.unbind(0)  # tracked views
    parts = [
        matmul(tracker, input[begin:end], expert, owner=owner[begin:end])
        for begin, end, expert in zip([0, *ends], ends, experts, strict=False)
        if end > begin
    ]
    parts.append(input.new_zeros((len(input) - ends[-1], mat2.shape[2])))
    return with_owner(torch.cat(parts), owner)


@register(Tensor.__getitem__)
def picked(tracker: Tracker, input: Tensor, index: Any) -> Any:
    """Scores ``W[experts]``, the expert of each row: rows in the order of the samples, as many for each."""
    samples = tracker.batch_now.size
    chosen = isinstance(index, Tensor) and index.ndim == 1 and index.dtype in (torch.int32, torch.int64)
    if not chosen or not tracker.tracks(input) or input.ndim != 3 or not input.is_contiguous():
        return NotImplemented
    in_order = len(index) > 1 and bool((index.diff() == 1).all())  # a slice of the stack, not one expert for each row
    if not samples or len(index) % samples or in_order or tracker.dim or tracker.batch_now.cu_seqlens is not None:
        return NotImplemented

    def gradient(layout: Layout, x: Tensor | None, grad: Tensor, weight: Tensor) -> Piece:
        rows = [part.unflatten(0, (samples, -1)) for part in (index[:, None].long(), grad.flatten(1))]
        return Lookup(rows[0], rows[1])

    return scored(tracker, lambda _, w: w[index], None, (input,), (gradient,))
