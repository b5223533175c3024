"""Stacks of experts ``[E, O, I]`` that share one call: each expert is a linear layer of its own rows, or looked up."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cwfast.errors import UnsupportedLayer
from cwfast.layers import Tracker, register
from cwfast.layers.linear import matmul
from cwfast.layers.outer import Lookup
from cwfast.layers.pieces import Piece
from cwfast.layers.rows import owner_behind, owner_of
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


class _Picked(torch.autograd.Function):
    """``W[experts]``, whose gradient cannot be had: only ``routed`` products know whose rows are whose."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, name: str) -> Tensor:
        ctx.name = name
        return weight[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise UnsupportedLayer(_ONLY.format(name=ctx.name))


_ONLY = (
    "parameter {name!r} is used as W[experts], which is scored only as the expert of each row x [S, I], in "
    "torch.bmm(W[experts], x.unsqueeze(-1)) or torch.bmm(x.unsqueeze(1), W[experts]); exclude it (exclude=[...]), or "
    "score by granularity='batch'"
)


class Routed(Tensor):
    """The class of ``W[experts]``: plain in every call but torch.bmm."""

    origin: tuple[Tracker, Tensor, Tensor]  # the tracker, W, experts

    @classmethod
    @torch._disable_dynamo
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.bmm, Tensor.bmm) and len(args) == 2 and not kwargs and torch.is_grad_enabled():
            first, second = args
            if isinstance(first, cls) != isinstance(second, cls):
                with torch._C.DisableTorchFunctionSubclass():
                    return _routed(second, first, after=False) if isinstance(first, cls) else _routed(first, second)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))  # its backward is refused


def _routed(x: Tensor, picked: Routed, after: bool = True) -> Tensor:
    """``bmm(x, picked)``, or where not ``after`` the other way round, of one row each."""
    tracker, weight, index = picked.origin
    node, samples = x.grad_fn, tracker.batch_now.samples
    rows_known = node is None or type(node).__name__ == "UnsqueezeBackward0"
    if x.ndim != 3 or x.shape[1 if after else 2] != 1 or tracker.tracks(x) or not rows_known:
        raise UnsupportedLayer(_ONLY.format(name=tracker.name_of(weight)))
    owner = owner_behind(node.next_functions[0][0], samples) if node is not None else None
    if owner is None and len(x) % samples:
        raise UnsupportedLayer(
            f"the rows that meet {tracker.name_of(weight)!r} as W[experts] must be those of the {samples} samples in "
            f"their order, or picked by an index; got {len(x)} rows"
        )
    own = picked.detach()

    def run(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x, own) if after else torch.bmm(own, x)

    def input_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        w = own.to(grad.dtype).mT
        return torch.bmm(grad, w) if after else torch.bmm(w, grad)

    def gradient(layout: Layout, x: Tensor, grad: Tensor, weight: Tensor) -> Piece:
        left, right = (x, grad) if after else (grad, x)
        (which, offsets), *rows = (
            layout.by_sample(t) for t in (index[:, None].long(), left.flatten(1), right.flatten(1))
        )
        outer = rows[0][0][..., :, None] * rows[1][0][..., None, :]
        return Lookup(which, outer.flatten(-2), offsets)

    return scored(tracker, run, x, (weight,), (gradient,), input_gradient=input_gradient, owner=owner)


@register(Tensor.__getitem__)
def picked(tracker: Tracker, input: Tensor, index: Any) -> Any:
    """Scores ``W[experts]`` in a product with one row for each of the experts: see ``Routed``."""
    chosen = isinstance(index, Tensor) and index.ndim == 1 and index.dtype in (torch.int32, torch.int64)
    if not chosen or not tracker.tracks(input) or input.ndim != 3 or not input.is_contiguous():
        return NotImplemented
    if not tracker.batch_now.size or tracker.dim or tracker.batch_now.cu_seqlens is not None:
        return NotImplemented
    result = _Picked.apply(input, index, tracker.name_of(input))
    result.__class__ = Routed
    result.origin = tracker, input, index
    return result
