"""Keeps selected weights at their value under any optimizer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cwfast import _picks, ops
from cwfast._parameters import Initial, initial_values
from cwfast.masks import MaskSet, matching
from cwfast.ops.rewind import Bits


@contextmanager
def freeze(
    model: nn.Module,
    optimizer: Optimizer,
    masks: MaskSet,
    initial: Initial | None = None,
    also: Sequence[nn.Module | Mapping[str, Tensor]] = (),
    *,
    backend: str = "auto",
) -> Iterator[None]:
    """Inside ``with``, the selected entries of ``model`` are bit-identical after every ``optimizer.step()``.

    Masking the gradient alone is not enough: momentum and weight decay still move such entries. So their gradients are
    zeroed as they arrive (before any clipping, so that they do not count in its norm), and their values are restored
    after each step.

    Args:
        model: its parameters named by ``masks``.
        optimizer: any torch optimizer, or a wrapper that holds one as ``.optimizer``.
        masks: of this model.
        initial: the values to keep, set on entry; None: the values on entry.
        also: modules or ``{name: tensor}`` mappings (an EMA copy, float32 master weights) that are held at the same
            values: on entry, after each step, and on exit.
        backend: see ``cwfast.ops.scatter_``.

    Raises:
        ValueError: ``masks``, ``initial`` or a member of ``also`` is not of this model, or the optimizer holds none of
            their tensors; nothing has been changed.
    """
    parameters = {name: p for name, p in matching(model, masks).items() if masks.counts[name]}
    source: Mapping[str, Tensor] = parameters if initial is None else initial_values(initial, parameters)
    held = [_Held(parameters, source, masks, backend)]
    held += [_Held(initial_values(copy, parameters), source, masks, backend) for copy in also]
    inner = getattr(optimizer, "optimizer", optimizer)
    stepped = {p.untyped_storage().data_ptr() for group in inner.param_groups for p in group["params"]}
    if parameters and not any(w.untyped_storage().data_ptr() in stepped for target in held for w in target.weights):
        raise ValueError("optimizer must hold parameters of model or tensors of also; it holds others only")
    for target in held:
        target.restore()
    zeros = [torch.zeros_like(values) for values in held[0].values]

    def zero_gradient(parameter: Tensor, picks: Bits, zero: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            ops.scatter_([gradient], [picks], [zero.to(gradient)], backend=backend)

    def restore_all(*_: object) -> None:
        for target in held:
            target.restore()

    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p, picks=picks, zero=zero: zero_gradient(p, picks, zero))
        for parameter, picks, zero in zip(parameters.values(), held[0].picks, zeros, strict=True)
        if parameter.requires_grad
    ]
    hooks.append(inner.register_step_post_hook(restore_all))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        restore_all()


class _Held:
    """Tensors, and the compact values that their selected entries keep."""

    def __init__(
        self, targets: Mapping[str, Tensor], source: Mapping[str, Tensor], masks: MaskSet, backend: str
    ) -> None:
        self.weights = [target.detach() for target in targets.values()]
        self.picks = [
            _picks.to_device(masks.picks(name), w.device) for name, w in zip(targets, self.weights, strict=True)
        ]
        wanted = [source[name].detach().to(w) for name, w in zip(targets, self.weights, strict=True)]
        self.values = ops.gather(wanted, self.picks, backend=backend)
        self.backend = backend

    def restore(self) -> None:
        ops.scatter_(self.weights, self.picks, self.values, backend=self.backend)
