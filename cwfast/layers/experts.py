"""Stacks of experts ``[E, O, I]`` that share one call: each expert is a linear layer of its own rows."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cwfast.layers import Tracker, register
from cwfast.layers.linear import matmul
from cwfast.layers.rows import owner_of
from cwfast.layers.scored import with_owner

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
