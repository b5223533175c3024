"""Affine normalisation ``y = w n(x) + b``: per sample, w's gradient sums ``grad * n(x)`` and b's sums ``grad``."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cwfast.layers import Tracker, register
from cwfast.layers.broadcast import reduced
from cwfast.layers.pieces import PerSample, Piece
from cwfast.layers.samples import Layout
from cwfast.layers.scored import scored

TRAINING = (
    "BatchNorm in training mode mixes the samples of a batch: a sample's gradient is taken as what flows through its "
    "own rows. In eval mode it is the gradient of its own loss"
)


def _affine(
    tracker: Tracker,
    function: Callable[..., Tensor],
    normalized: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    recompute: Callable[..., Tensor] | None = None,
    channels: bool = False,
) -> Tensor:
    """``channels``: the parameters belong to dimension 1 of x, not to the last ones."""

    def shape(grad: Tensor, parameter: Tensor) -> torch.Size:
        return torch.Size([*parameter.shape, *[1] * (grad.ndim - 2)]) if channels else parameter.shape

    def of_bias(layout: Layout, x: Tensor, grad: Tensor, parameter: Tensor) -> Piece:
        found = reduced(layout, grad, shape(grad, parameter)).gradients
        return PerSample(found.reshape(len(found), *parameter.shape))

    def of_weight(layout: Layout, x: Tensor, grad: Tensor, parameter: Tensor) -> Piece:
        n = normalized(x.to(torch.promote_types(x.dtype, grad.dtype)))  # as under autocast
        return of_bias(layout, x, grad * n, parameter)

    return scored(tracker, function, x, (weight, bias), (of_weight, of_bias), recompute=recompute)


@register(functional.layer_norm, torch.layer_norm)
def layer_norm(
    tracker: Tracker,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """Scores ``torch.nn.LayerNorm``."""
    return _affine(
        tracker,
        lambda x, w, b: functional.layer_norm(x, normalized_shape, w, b, eps),
        lambda x: functional.layer_norm(x, normalized_shape, None, None, eps),
        input,
        weight,
        bias,
    )


@register(functional.rms_norm, torch.rms_norm)
def rms_norm(
    tracker: Tracker,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Scores ``torch.nn.RMSNorm``."""
    return _affine(
        tracker,
        lambda x, w, b: functional.rms_norm(x, normalized_shape, w, eps),
        lambda x: functional.rms_norm(x, normalized_shape, None, eps),
        input,
        weight,
        None,
    )


@register(functional.group_norm, torch.group_norm)
def group_norm(
    tracker: Tracker,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Scores ``torch.nn.GroupNorm``."""
    return _affine(
        tracker,
        lambda x, w, b: functional.group_norm(x, num_groups, w, b, eps),
        lambda x: functional.group_norm(x, num_groups, None, None, eps),
        input,
        weight,
        bias,
        channels=True,
    )


@register(functional.batch_norm)
def batch_norm(
    tracker: Tracker,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Scores ``torch.nn.BatchNorm1d`` to 3d."""
    if training:
        warnings.warn(TRAINING, stacklevel=2)
    # The statistics of a training batch are its own; they are not counted a second time in backward.
    mean, var = (None, None) if training else (running_mean, running_var)
    return _affine(
        tracker,
        lambda x, w, b: functional.batch_norm(x, running_mean, running_var, w, b, training, momentum, eps),
        lambda x: functional.batch_norm(x, mean, var, None, None, training, momentum, eps),
        input,
        weight,
        bias,
        recompute=lambda x, w, b: functional.batch_norm(x, mean, var, w, b, training, momentum, eps),
        channels=True,
    )
