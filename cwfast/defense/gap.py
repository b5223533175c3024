"""The gap criterion: which weights made the difference between the loss on members and the loss on others."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cwfast._parameters import Initial, initial_values, trainable
from cwfast._ranks import all_raise, total
from cwfast._shards import is_sharded, local, reshard, whole_like
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
        model: trained; worked on as a copy, in evaluation mode, with BatchNorm's statistics of training all along. One
            that FSDP2 shards is worked on itself and put back, weights, gradients and modes; each rank gives its own
            batches, as many as the others.
        initial: its initial weights: module, mapping or safetensors file.
        members: re-iterable batches ``(inputs, targets)`` of training samples.
        reference: the same of non-members.
        loss: mean over a batch; None: cross-entropy.
        points: of the quadrature; one forward and backward pass over both sets for each.

    Returns:
        ``{name: signed shares}`` of the parameters that require a gradient, in the loss's unit (nats); float32, or
        float64 for float64 parameters. Of sharded ones, DTensors: shares of the gap between all ranks' samples.

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
    with _working(model) as (work, parameters):
        memory = {name: local(parameter) for name, parameter in parameters.items()}
        end = {name: weight.to(sum_dtype(weight.dtype), copy=True) for name, weight in memory.items()}
        start = {name: value.to(end[name]) for name, value in initial_values(initial, parameters).items()}
        delta = {name: end[name] - start[name] for name in parameters}
        shares = {name: torch.zeros_like(value) for name, value in end.items()}
        weights = _weights(members, reference, parameters)
        for point in range(points):
            for name, weight in memory.items():
                weight.copy_(torch.lerp(start[name], end[name], (point + 0.5) / points))
            for name, gradient in _gradients(work, members, reference, weights, loss or cross_entropy).items():
                shares[name].addcmul_(delta[name], local(gradient), value=1 / points)
    return {n: whole_like(share, parameters[n]) if is_sharded(parameters[n]) else share for n, share in shares.items()}


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
    with _working(model) as (work, parameters):
        weights = _weights(members, reference, parameters)
        return _gradients(work, members, reference, weights, loss or cross_entropy)


@contextmanager
def _working(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """What may be changed in evaluation mode, and its parameters: a copy, or the model itself where FSDP2 shards it."""
    reshard(model)
    parameters = trainable(model)
    if not any(map(is_sharded, parameters.values())):
        work = copy.deepcopy(model).eval()
        yield work, trainable(work)
        return
    modes = [(module, module.training) for module in model.modules()]
    before = [(p, p.grad, local(p).clone()) for p in parameters.values()]
    for parameter in parameters.values():
        parameter.grad = None
    try:
        yield model.eval(), parameters
    finally:
        reshard(model)
        for module, mode in modes:
            module.training = mode
        for parameter, grad, values in before:
            local(parameter).copy_(values)
            parameter.grad = grad


def _weights(
    members: Iterable[Batch], reference: Iterable[Batch], parameters: Mapping[str, nn.Parameter]
) -> tuple[float, float]:
    """Of a member's loss and of a reference sample's in ``L_ref - L_mem``."""
    lengths = {
        name: [len(targets) for _, targets in batches]
        for name, batches in (("members", members), ("reference", reference))
    }
    counts = {name: sum(found) for name, found in lengths.items()}
    ranks = 1
    sharded = next((p for p in parameters.values() if is_sharded(p)), None)
    if sharded is not None:  # samples of all ranks, over which FSDP2 averages gradients
        mesh, error = sharded.device_mesh, None
        ranks, groups = mesh.size(), mesh.get_all_groups()
        for name, found in lengths.items():
            batches = len(found)
            for group in groups:
                counts[name], batches = total(counts[name], group), total(batches, group)
            if batches != ranks * len(found):
                error = ValueError(
                    f"{name} must hold as many batches on each rank; got {len(found)} here and {batches} on all {ranks}"
                )
        all_raise(error, "gap_shares", groups)  # or the ranks would wait for one another for ever
    for name, count in counts.items():
        if count == 0:
            raise ValueError(f"{name} must hold at least one sample, and be iterable more than once; got none")
    return -ranks / counts["members"], ranks / counts["reference"]


def _gradients(
    work: nn.Module, members: Iterable[Batch], reference: Iterable[Batch], weights: tuple[float, float], loss: Loss
) -> dict[str, Tensor]:
    parameters = trainable(work)
    # What lies outside the model gets no gradient. FSDP2 needs a full backward: it runs on stand-ins of its parameters.
    leaves = None if any(map(is_sharded, parameters.values())) else list(parameters.values())
    found = {name: torch.zeros_like(p, dtype=sum_dtype(p.dtype)) for name, p in parameters.items()}  # g_ref - g_mem
    for parameter in parameters.values():
        parameter.grad = None
    for batches, weight in ((reference, weights[1]), (members, weights[0])):
        for inputs, targets in batches:
            (loss(work(inputs), targets) * (weight * len(targets))).backward(inputs=leaves)
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    found[name] += parameter.grad
                    parameter.grad = None
    return found
