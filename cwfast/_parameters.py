"""A model's parameters by name, and the initial values that belong to them."""

import os
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from cwfast._shards import by_rows, is_sharded, local, local_like, part_of
from cwfast.checkpoint import Checkpoint

Initial: TypeAlias = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, as ``named_parameters`` names them: a tied one appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, DDP and DataParallel, whose parameters bear their own names."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def initial_values(initial: Initial, expected: Mapping[str, Tensor], what: str = "initial") -> dict[str, Tensor]:
    """The tensors of ``initial`` under the names of ``expected``, in its order.

    Args:
        initial: a module of the same architecture, a mapping (a ``state_dict``), or a safetensors file or folder, of
            which the expected tensors are read.
        expected: what must be there, with these shapes. Of a DTensor (FSDP2), this rank's part of the initial tensor is
            returned, and of a file nothing else is read where that is a range of rows.
        what: the argument's name, for messages.

    Raises:
        TypeError: ``initial`` is none of these.
        ValueError: a name is missing or a shape differs; the message names it.
    """
    if isinstance(initial, nn.Module):
        found: Mapping[str, Tensor] = dict(initial.named_parameters(remove_duplicate=False))
    elif isinstance(initial, Mapping):
        found = initial
    elif isinstance(initial, str | os.PathLike):
        checkpoint = Checkpoint(initial)
        check_shapes({name: checkpoint.entry(name).shape for name in expected if name in checkpoint}, expected, what)
        return {name: read_like(checkpoint, name, tensor) for name, tensor in expected.items()}
    else:
        raise TypeError(
            f"{what} must be a module, a mapping, or a safetensors file or folder; got {type(initial).__name__}"
        )
    check_shapes({name: tuple(found[name].shape) for name in expected if name in found}, expected, what)
    return {name: local_like(found[name], tensor, f"{what}[{name!r}]") for name, tensor in expected.items()}


def read_like(checkpoint: Checkpoint, name: str, expected: Tensor) -> Tensor:
    """The entries of a tensor in a file that ``expected`` has on this rank."""
    if not is_sharded(expected):
        return checkpoint.tensor(name)
    if not by_rows(expected):
        return local_like(checkpoint.tensor(name), expected, repr(name)).clone()  # not all of it stays
    part = part_of(expected, repr(name))
    pieces = [*checkpoint.pieces(name, max(part.end - part.begin, 1), begin=part.begin, end=part.end)]
    return pieces[0].view(part.local) if pieces else torch.empty(part.local, dtype=checkpoint.entry(name).dtype)


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor], what: str = "initial") -> None:
    """Every expected name is there, with its shape.

    Raises:
        ValueError: not so; the message names it.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{what} must hold every parameter; {len(missing)} missing, the first is {missing[0]!r}")
    for name, tensor in expected.items():
        if found[name] != tuple(tensor.shape):
            raise ValueError(
                f"{what}[{name!r}] must have the shape of the parameter, {tuple(tensor.shape)}; got {found[name]}"
            )


def check_apart(initial: Initial, parameters: Mapping[str, Tensor]) -> None:
    """``initial`` does not lie in the memory of the parameters, as ``model.state_dict()`` does: training changed it.

    Raises:
        ValueError: it does.
    """
    if isinstance(initial, nn.Module):
        initial = dict(initial.named_parameters(remove_duplicate=False))
    if isinstance(initial, Mapping):
        for name, parameter in parameters.items():
            value = initial.get(name)
            if value is not None and local(value).numel() and local(value).data_ptr() == local(parameter).data_ptr():
                raise ValueError(
                    f"initial must be a copy made before training (copy.deepcopy(model)); "
                    f"initial[{name!r}] is the model's own memory"
                )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the ``state_dict``, on the same devices."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
