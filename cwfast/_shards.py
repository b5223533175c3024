"""DTensors, as FSDP2 shards parameters: which entries lie on this rank. Nothing here imports torch.distributed early:
where nobody has, nobody has a DTensor either.
"""

import math
import sys
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn


class Part(NamedTuple):
    """This rank's contiguous range of a flattened (row-major) DTensor.

    Attributes:
        shape: of the whole tensor.
        begin: the flat index of the first entry.
        local: the shape of this rank's part.
        mesh: the DTensor's DeviceMesh.
        dim: the mesh dimension over which rows are sharded; None: every rank holds everything.
    """

    shape: tuple[int, ...]
    begin: int
    local: tuple[int, ...]
    mesh: Any
    dim: int | None

    @property
    def end(self) -> int:
        """The flat index after the last entry."""
        return self.begin + math.prod(self.local)

    @property
    def group(self) -> Any:
        """The ranks that hold one copy of the tensor together."""
        return self.mesh.get_group(self.dim or 0)

    def of_rank(self, rank: int) -> "Part":
        """The part of another rank of the group. Rows are dealt as ``torch.chunk`` deals them: the last ranks may have
        fewer, or none.
        """
        if self.dim is None:
            return self
        rows, width = -(-self.shape[0] // self.mesh.size(self.dim)), math.prod(self.shape[1:])
        first, last = (min(rows * place, self.shape[0]) for place in (rank, rank + 1))
        return self._replace(begin=first * width, local=(last - first, *self.shape[1:]))


def is_sharded(value: object) -> TypeGuard[Any]:
    """Whether this is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def part_of(value: Any, name: str = "value") -> Part:
    """Where this rank's entries of a DTensor lie.

    Raises:
        ValueError: it is sharded in another way than by rows of one mesh dimension, so that a part is no contiguous
            range.
    """
    if not by_rows(value):
        raise ValueError(
            f"{name} must be sharded along dimension 0 of one mesh dimension (the others: copies), as fully_shard does "
            f"it; got {value.placements}"
        )
    mesh, shape = value.device_mesh, tuple(value.shape)
    dims = [i for i, placement in enumerate(value.placements) if placement.is_shard()]
    part = Part(shape, 0, shape, mesh, dims[0] if dims else None)
    return part.of_rank(mesh.get_local_rank(dims[0])) if dims else part


def local(value: Tensor) -> Tensor:
    """This rank's part of a DTensor, in its own memory; another tensor itself, detached."""
    if not is_sharded(value):
        return value.detach()
    with torch.no_grad():
        return value.to_local()


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter's ``.grad``, sharded as the parameter is. Where it is not (under tensor
    parallelism: copies of a weight, each with its own term of the gradient), all ranks exchange it.
    """
    gradient = parameter.grad
    assert gradient is not None  # asked for only where there is one
    if is_sharded(gradient) and is_sharded(parameter) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def local_like(value: Tensor, like: Tensor, name: str = "value") -> Tensor:
    """The entries of ``value`` that ``like`` has on this rank: of ``value`` whole, or sharded as ``like`` is.

    Raises:
        ValueError: ``value`` is sharded otherwise, or ``like`` in another way than by dimensions, or copied.
    """
    if not is_sharded(like) and not is_sharded(value):
        return value.detach()
    if is_sharded(like) and is_sharded(value):
        if value.device_mesh == like.device_mesh and value.placements == like.placements:
            return local(value)
        raise ValueError(
            f"{name} must be sharded as the parameter is, {like.placements} of {like.device_mesh}; got "
            f"{value.placements} of {value.device_mesh}"
        )
    if is_sharded(value):
        raise ValueError(f"{name} must be a plain tensor, as the parameter is; got a DTensor {value.placements}")
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    _check_plain(placements, name)
    found = value.detach()
    for i, placement in enumerate(placements):
        if placement.is_shard():  # dealt as torch.chunk deals it: the last ranks may have less, or nothing
            size = found.shape[placement.dim]
            most, place = -(-size // mesh.size(i)), mesh.get_local_rank(i)
            first, last = min(most * place, size), min(most * (place + 1), size)
            found = found.narrow(placement.dim, first, last - first)
    return found


def by_rows(value: Any) -> bool:
    """Whether a DTensor is sharded along dimension 0 of one mesh dimension at most, and copied over the others."""
    from torch.distributed.tensor import Replicate, Shard

    other = [placement for placement in value.placements if type(placement) is not Replicate]
    return len(other) < 2 and all(type(placement) is Shard and placement.dim == 0 for placement in other)


def whole_like(values: Tensor, like: Any) -> Any:
    """This rank's ``values`` as a DTensor that is sharded as ``like`` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def features(value: Any, weight: Any, dim: int) -> Tensor:
    """This rank's part of a DTensor ``[..., F]`` of all samples, its features dealt as dimension ``dim`` of the weight
    is. Where they are dealt otherwise, the ranks exchange them.

    Raises:
        ValueError: the weight is sharded in another way than by dimensions, or copied.
    """
    from torch.distributed.tensor import Replicate, Shard

    _check_plain(weight.placements, "a weight")
    placements = [Shard(value.ndim - 1) if placement.is_shard(dim) else Replicate() for placement in weight.placements]
    with torch.no_grad():
        return value.redistribute(placements=placements).to_local()


def _check_plain(placements: Any, name: str) -> None:
    from torch.distributed.tensor import Replicate, Shard

    if not all(type(placement) in (Shard, Replicate) for placement in placements):
        raise ValueError(f"{name} must be sharded by dimensions (Shard) or copied (Replicate); got {placements}")


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was given: FSDP2 puts whole tensors in the place of their parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]


def summed(whole: Tensor, like: Any) -> Tensor:
    """This rank's part of the sum of all ranks' ``whole``, sharded as ``like`` is: a reduce-scatter."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = like.device_mesh
    with torch.no_grad():
        sums = DTensor.from_local(whole, mesh, [Partial()] * mesh.ndim, run_check=False)
        return sums.redistribute(mesh, like.placements).to_local()


def versions(parameter: Tensor) -> tuple[int, ...]:
    """Counters of which one moves when the parameter is changed in place: of a DTensor, also that of the local part."""
    return (parameter._version, local(parameter)._version) if is_sharded(parameter) else (parameter._version,)


def reshard(model: nn.Module) -> None:
    """Drop the whole copies of FSDP2's parameters that a forward pass has left: they hide the sharded ones, and would
    be used again where those have been written meanwhile.
    """
    for module in fsdp_modules(model):
        module.reshard()
