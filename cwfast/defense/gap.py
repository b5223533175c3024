"""The gap criterion: which weights made the difference between the loss on members and the loss on others."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cwfast._parameters import Initial, initial_values, trainable
from cwfast._tracking import sum_dtype
from cwfast.data import check_reiterable
from cwfast.defense.recalibration import Batch
from cwfast.training import Loss, cross_entropy


def gap_shares(
    model: nn.Module,
    initial: Initial,
    members: Iterable[Batch],
    reference: Iterable[Batch],
    *,
    loss: Loss | None = None,
    points: int = 3,
) -> dict[str, Tensor]:
    """The generalisation gap, by weight: ``share_i = d_i * mean_t [g_ref,i(w0 + t d) - g_mem,i(w0 + t d)]``.

    ``d = w - w0``; g is the gradient of the mean loss over all reference or all member samples; t runs over the
    midpoints of ``points`` equal parts of 0 .. 1. The shares sum to ``[L_ref - L_mem](w) - [L_ref - L_mem](w0)``, up
    to the error of this quadrature. A positive share: rewinding the weight closes the gap, to first order.

    Args:
        model: trained; worked on as a copy, in evaluation mode, with BatchNorm's statistics of training all along.
        initial: its initial weights: module, mapping or safetensors file.
        members: re-iterable batches ``(inputs, targets)`` of training samples.
        reference: the same of non-members.
        loss: mean over a batch; None: cross-entropy.
        points: of the quadrature; one forward and backward pass over both sets for each.

    Returns:
        ``{name: signed shares}`` of the parameters that require a gradient, in the loss's unit (nats); float32, or
        float64 for float64 parameters.

    Raises:
        TypeError: ``members`` or ``reference`` can be iterated only once.
        ValueError: ``points`` is below 1, a set is empty, or ``initial`` is not of this model.

    Source:
        Kin of integrated gradients (Sundararajan et al., ICML 2017) and of Loss Change Allocation (Lan et al., NeurIPS
        2019), which allocates one loss along the training path.
    """
    if not isinstance(points, int) or points < 1:
        raise ValueError(f"points must be a whole number, at least 1; got {points!r}")
    check_reiterable(members=members, reference=reference)
    work = copy.deepcopy(model).eval()
    parameters = trainable(work)
    end = {name: parameter.detach().to(sum_dtype(parameter.dtype), copy=True) for name, parameter in parameters.items()}
    start = {name: value.to(end[name]) for name, value in initial_values(initial, parameters).items()}
    delta = {name: end[name] - start[name] for name in parameters}
    shares = {name: torch.zeros_like(value) for name, value in end.items()}
    weights = _weights(members, reference)
    for point in range(points):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.lerp(start[name], end[name], (point + 0.5) / points))
        for name, gradient in _gradients(work, members, reference, weights, loss or cross_entropy).items():
            shares[name].addcmul_(delta[name], gradient, value=1 / points)
    return shares


def gap_gradients(
    model: nn.Module, members: Iterable[Batch], reference: Iterable[Batch], *, loss: Loss | None = None
) -> dict[str, Tensor]:
    """``g_ref - g_mem`` at the model's weights: gradients of the mean loss over all samples, in evaluation mode.

    Args:
        model: worked on as a copy.
        members: re-iterable batches ``(inputs, targets)`` of training samples.
        reference: the same of non-members.
        loss: mean over a batch; None: cross-entropy.

    Returns:
        ``{name: signed gradients}`` of the parameters that require a gradient; zeros where a parameter is not used.

    Raises:
        TypeError: ``members`` or ``reference`` can be iterated only once.
        ValueError: a set is empty.
    """
    check_reiterable(members=members, reference=reference)
    weights = _weights(members, reference)
    return _gradients(copy.deepcopy(model).eval(), members, reference, weights, loss or cross_entropy)


def _weights(members: Iterable[Batch], reference: Iterable[Batch]) -> tuple[float, float]:
    """Of a member's loss and of a reference sample's in ``L_ref - L_mem``."""
    return -1 / _samples("members", members), 1 / _samples("reference", reference)


def _gradients(
    work: nn.Module, members: Iterable[Batch], reference: Iterable[Batch], weights: tuple[float, float], loss: Loss
) -> dict[str, Tensor]:
    parameters = trainable(work)
    found = {name: torch.zeros_like(p, dtype=sum_dtype(p.dtype)) for name, p in parameters.items()}  # g_ref - g_mem
    for batches, weight in ((reference, weights[1]), (members, weights[0])):
        for inputs, targets in batches:
            value = loss(work(inputs), targets) * (weight * len(targets))
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(found.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
    return found


def _samples(name: str, batches: Iterable[Batch]) -> int:
    count = sum(len(targets) for _, targets in batches)
    if count == 0:
        raise ValueError(f"{name} must hold at least one sample, and be iterable more than once; got none")
    return count
