"""The autograd function behind every rule: the ordinary call, whose backward hands the weights' gradients over."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cwfast._shards import is_sharded, local, whole_like
from cwfast.errors import UnsupportedLayer
from cwfast.layers.pieces import Piece
from cwfast.layers.rows import owner_of
from cwfast.layers.samples import Layout, Whole

if TYPE_CHECKING:
    from cwfast.layers import Tracker

Gradient = Callable[[Layout, Tensor, Tensor, Tensor], Piece]  # (layout, input, output gradient, weight)


class _Call(NamedTuple):
    tracker: "Tracker"
    function: Callable[..., Tensor]
    recompute: Callable[..., Tensor]
    gradients: Sequence[Gradient]
    input_gradient: Callable[..., Tensor] | None
    uses: Sequence[Any]
    owner: Tensor | None


def scored(
    tracker: "Tracker",
    function: Callable[..., Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    gradients: Sequence[Gradient],
    *,
    input_gradient: Callable[..., Tensor] | None = None,
    recompute: Callable[..., Tensor] | None = None,
    owner: Tensor | None = None,
) -> Tensor:
    """``function(x, *weights)``, scored.

    Args:
        tracker: as the rule got it.
        function: of x and the weights, with everything else bound; runs once in forward, as it would have run.
        x: the layer's input, or None.
        weights: each a parameter, a view of one, or None.
        gradients: for each weight, ``gradient(layout, x, grad, weight) -> Piece``: the gradient of the loss with
            respect to it, from the gradient ``grad`` with respect to the result.
        input_gradient: ``(x, grad, *weights) -> gradient of x``; None: by running the function again under autograd.
        recompute: what to run then, where the function has side effects.
        owner: ``[rows]``, the sample of each row of a 2-D x; None: found from the shapes and the graph of x.
    """
    samples = tracker.batch_now.size
    if x is not None and x.is_floating_point() and (name := tracker.shared(x, tracker.dim)) is not None:
        raise UnsupportedLayer(
            f"a scored layer's input must belong to the samples; got {name!r} of the model (shape {tuple(x.shape)}), "
            "which all of them share. Expand it to one for each sample, or exclude the parameter that it meets"
        )
    if owner is None and x is not None and samples is not None and tracker.dim == 0:
        owner = owner_of(x, samples)
    uses = [tracker.use(weight, owner) for weight in weights]
    return _Scored.apply(
        _Call(tracker, function, recompute or function, gradients, input_gradient, uses, owner), x, *weights
    )


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor | None, *weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.call = call
        ctx.row_owner = call.owner  # for the layers that get the result: rows.owner_of
        device = next(t.device.type for t in (x, *weights) if t is not None)
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return call.function(x, *weights)

    @staticmethod
    @once_differentiable  # a gradient of the gradient would miss what the kernels computed
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors  # here checkpointed layers run again, and are tracked
        with torch._C.DisableTorchFunctionSubclass():  # the saved weights are tracked: our own products are not
            call = ctx.call
            grad_x = None
            if ctx.needs_input_grad[1]:
                if call.input_gradient is not None:
                    grad_x = call.input_gradient(x, grad, *weights).to(x.dtype)
                else:
                    grad_x = _again(ctx.autocast, call.recompute, x, grad, *weights)
            found: list[Tensor | None] = []
            for weight, use, gradient, needed in zip(
                weights, call.uses, call.gradients, ctx.needs_input_grad[2:], strict=True
            ):
                if weight is None or not needed:
                    found.append(None)
                elif use is not None:
                    found.append(_as(weight, call.tracker.record(use, gradient(use.layout, x, grad, weight))))
                else:  # trained, not scored
                    piece, shape = gradient(Whole(), x, grad, weight), local(weight).shape
                    dtype = torch.promote_types(grad.dtype, torch.float32)
                    total = piece.total(shape, dtype, weight.device)
                    found.append(_as(weight, total.reshape(shape).to(weight.dtype)))
        return None, grad_x, *found


def _as(weight: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Of a DTensor, this rank's part of the gradient as one."""
    return whole_like(gradient, weight) if gradient is not None and is_sharded(weight) else gradient


def _again(
    autocast: tuple[str, torch.dtype, bool], function: Callable[..., Tensor], x: Tensor, grad: Tensor, *weights: Any
) -> Tensor:
    """The gradient with respect to x, by running the function once more."""
    device, dtype, enabled = autocast
    with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
        leaf = x.detach().requires_grad_()
        result = function(leaf, *(w.detach() if w is not None else None for w in weights))
    return torch.autograd.grad(result, leaf, grad)[0]


class _WithOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Tensor) -> Tensor:
        ctx.row_owner = owner
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_owner(x: Tensor, owner: Tensor) -> Tensor:
    """x, remembering the sample of each of its rows for the layers that get it."""
    result: Tensor = _WithOwner.apply(x, owner)
    return result
