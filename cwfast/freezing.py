"""Keeps selected weights at their value under any optimizer."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cwfast import _picks, ops
from cwfast._parameters import Initial, initial_values
from cwfast._shards import is_sharded, local
from cwfast.checkpoint import Checkpoint
from cwfast.masks import MaskSet, matching, placed, streamed
from cwfast.ops._entries import Entries, write, write_one


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
    after each step. A step that calls a closure several times (LBFGS) may move them in between.

    Of a model that FSDP2 shards, each rank holds its own rows, of sharded gradients as of sharded weights.

    Memory, for the model and again for each member of ``also``: values and positions of the selected entries; in
    float32 6 bytes each where they are below 1/16 of a parameter, else 4 bytes each and 1/8 byte a weight. Besides,
    zeros for the largest parameter's selected entries, and the positions that ``masks`` itself keeps.

    Args:
        model: its parameters named by ``masks``.
        optimizer: any torch optimizer, or a wrapper that holds one as ``.optimizer``.
        masks: of this model.
        initial: the values to keep, set on entry: module, mapping, or safetensors file or folder (read once, in pieces,
            of which the selected values are kept); None: the values on entry.
        also: modules or ``{name: tensor}`` mappings (an EMA copy, float32 master weights) that are held at the same
            values: on entry, after each step, and on exit. Of an ``AveragedModel``, give its ``.module``.
        backend: see ``cwfast.ops.scatter_``.

    Raises:
        TypeError: ``optimizer`` is no torch optimizer and holds none, or is schedule-free; or ``also`` is no sequence
            of modules and mappings.
        ValueError: ``masks``, ``initial`` or a member of ``also`` is not of this model, or the optimizer holds none of
            their tensors; nothing has been changed. From a step: a parameter has been replaced in ``model``, or got
            another shape, dtype or device. From ``backward``: a gradient is sparse (TypeError).
    """
    masks = placed(model, masks)
    parameters = {name: p for name, p in matching(model, masks, sharded=True).items() if masks.counts[name]}
    inner = _inner(optimizer)
    values = _values(model, masks, parameters, initial)
    targets: list[Mapping[str, Tensor]] = [parameters, *_copies(also, parameters)]
    held = [_Held(target, values, masks, backend) for target in targets]
    del values  # where they are of another dtype or device, held has copies
    stepped = {
        local(p).untyped_storage().data_ptr()
        for group in inner.param_groups
        for p in group["params"]
        if is_sharded(p) or not is_traceable_wrapper_subclass(p)  # others have no memory of their own
    }
    if parameters and not any(w.untyped_storage().data_ptr() in stepped for target in held for w in target.memory()):
        raise ValueError("optimizer must hold parameters of model or tensors of also; it holds others only")
    places = [(*_place(model, name), parameter) for name, parameter in parameters.items()]

    def restore_all(*_: object) -> None:
        """What is in place is restored, also where an error follows."""
        for target in held:
            target.restore()
        for owner, name, parameter in places:
            now = owner.get(name)
            if now is not parameter and not (is_sharded(parameter) and now is not None and not is_sharded(now)):
                raise ValueError(
                    f"a parameter must not be replaced while it is frozen; another {name!r} is in its place"
                )

    restore_all()
    zeros = _Zeros(max((entries.count for entries in held[0].entries), default=0))
    hooks: list[Any] = [
        parameter.register_post_accumulate_grad_hook(_zeroing(entries, zeros))
        for parameter, entries in zip(parameters.values(), held[0].entries, strict=True)
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
    """Tensors of one module or mapping, and the compact values that their selected entries keep."""

    def __init__(
        self, targets: Mapping[str, Tensor], values: Mapping[str, Tensor], masks: MaskSet, backend: str
    ) -> None:
        self.weights = list(targets.values())
        self.entries = [
            Entries(name, weight, _picks.to_device(masks.picks(name), weight.device), backend=backend)
            for name, weight in zip(targets, self.memory(), strict=True)
        ]
        self._values = [values[n].to(weight).contiguous() for n, weight in zip(targets, self.memory(), strict=True)]

    def memory(self) -> list[Tensor]:
        """What is written: of a DTensor, the part on this rank, which FSDP2 may have moved."""
        return [local(weight) for weight in self.weights]

    def restore(self) -> None:
        """As the tensors lie now: their memory may have been exchanged through ``.data``."""
        write(self.entries, self.memory(), self._values)


class _Zeros:
    """A buffer of each dtype and device, as long as the longest of those who take a part of it."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, tensor: Tensor, count: int) -> Tensor:
        key = tensor.dtype, tensor.device
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(self._longest, dtype=tensor.dtype, device=tensor.device)
        return self._buffers[key][:count]


def _zeroing(entries: Entries, zeros: _Zeros) -> Callable[[Tensor], None]:
    """A hook that zeroes the selected entries of a parameter's gradient."""
    part: Tensor | None = None

    def zero_gradient(parameter: Tensor) -> None:
        nonlocal part
        gradient = parameter.grad
        if gradient is None:
            return
        gradient = local(gradient)
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"gradients must be dense to be frozen in part; that of {entries.name!r} is {gradient.layout}"
            )
        if part is None or part.dtype != gradient.dtype or part.device != gradient.device:
            part = zeros.like(gradient, entries.count)
        write_one(entries, gradient, part, prefix="the gradient of ")

    return zero_gradient


def _values(
    model: nn.Module, masks: MaskSet, parameters: Mapping[str, nn.Parameter], initial: Initial | None
) -> dict[str, Tensor]:
    """The selected entries' values, compact, in the dtype and on the device of their source."""
    if isinstance(initial, str | os.PathLike):
        return dict(zip(parameters, streamed(model, masks, parameters, Checkpoint(initial)), strict=True))
    source = parameters if initial is None else initial_values(initial, parameters)
    found = {}
    for name, tensor in source.items():
        picks = _picks.to_device(masks.picks(name), tensor.device)
        found[name] = ops.gather([local(tensor)], [picks])[0]
    return found


def _copies(
    also: Sequence[nn.Module | Mapping[str, Tensor]], expected: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    if isinstance(also, nn.Module | Mapping) or not all(isinstance(copy, nn.Module | Mapping) for copy in also):
        kinds = type(also).__name__ if isinstance(also, nn.Module | Mapping) else [type(copy).__name__ for copy in also]
        raise TypeError(f"also must be a sequence of modules and {{name: tensor}} mappings; got {kinds}")
    for i, copy in enumerate(also):
        have = dict(copy.named_parameters(remove_duplicate=False)) if isinstance(copy, nn.Module) else copy
        for name in expected:  # of whole copies, nobody would hold the other ranks' rows
            if is_sharded(expected[name]) and name in have and not is_sharded(have[name]):
                raise ValueError(f"also[{i}][{name!r}] must be a DTensor, as the parameter is; got a plain tensor")
    return [initial_values(copy, expected, what=f"also[{i}]") for i, copy in enumerate(also)]


def _inner(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside wrappers (of accelerate, lightning), which may be optimizers too but run no hooks."""
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or hold one as .optimizer; got {type(optimizer).__name__}"
        )
    if callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None)):
        raise TypeError(
            f"optimizer must change weights in its step() alone; {type(inner).__name__} exchanges them in train() and "
            "eval() too (schedule-free), and decays the others"
        )
    return inner


def _place(model: nn.Module, name: str) -> tuple[dict[str, nn.Parameter | None], str]:
    owner, _, last = name.rpartition(".")
    return model.get_submodule(owner)._parameters, last
