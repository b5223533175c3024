"""``y = x W^T + b``: per sample, the weight's gradient is a sum of outer products; the bias's has a constant input."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cwfast.layers import Tracker, register


class _Linear(torch.autograd.Function):
    """The ordinary linear layer, whose backward hands inputs and output gradients to the tracker."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tracker: Tracker, weight_use: Any, bias_use: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tracker, ctx.weight_use, ctx.bias_use = tracker, weight_use, bias_use
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable  # a gradient of the gradient would miss what the kernels computed
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch._C.DisableTorchFunctionSubclass():  # the saved weight is tracked: our own products are not
            x, weight = ctx.saved_tensors
            # Under autocast the products run, and their gradients come, in a lower precision than the saved tensors.
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
            grad_weight = ctx.tracker.record(ctx.weight_use, x, grad) if ctx.weight_use else None
            grad_bias = (
                ctx.tracker.record(ctx.bias_use, x.new_ones(1).expand(*x.shape[:-1], 1), grad) if ctx.bias_use else None
            )
            if ctx.needs_input_grad[1] and not ctx.weight_use:  # trained, not scored
                grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
            if ctx.needs_input_grad[2] and not ctx.bias_use:
                grad_bias = grad.flatten(0, -2).sum(dim=0)
        return grad_x, grad_weight, grad_bias, None, None, None


@register(functional.linear)
def linear(tracker: Tracker, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scores ``torch.nn.functional.linear`` and so ``torch.nn.Linear``."""
    return _Linear.apply(input, weight, bias, tracker, tracker.use(weight), tracker.use(bias))
