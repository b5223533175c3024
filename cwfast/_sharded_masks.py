"""Sets of critical weights of parameters that FSDP2 shards: each rank has the entries of its own rows."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cwfast import _picks, _ranks, reference
from cwfast._shards import Part, is_sharded, local, part_of, whole_like
from cwfast.masks import MaskSet, placed
from cwfast.ops.rewind import Bits
from cwfast.ops.select import packed_bytes


class ShardedMaskSet(MaskSet):
    """This rank's part of a set: ``shapes``, ``counts``, ``total`` and all else are of the rows that lie here.

    ``cwfast.select`` of DTensors gives it; ``rewind_`` and ``freeze`` take it. ``whole()`` is the set of one process.

    Args:
        bits: as for ``MaskSet``, of this rank's parts.
        parts: ``{name: where this rank's entries lie}``, the same names.
        zero_score_selected: of all ranks.

    Raises:
        ValueError: as ``MaskSet`` does, or the parts lie on several meshes or mesh dimensions.
    """

    def __init__(self, bits: Mapping[str, Bits], parts: Mapping[str, Part], **about: Any) -> None:
        super().__init__(bits, {name: part.local for name, part in parts.items()}, **about)
        self.parts = dict(parts)
        if parts:
            group_of(self.parts)

    @classmethod
    def of(cls, masks: MaskSet, model: nn.Module) -> "ShardedMaskSet":
        """This rank's part of a whole set, as ``model`` is sharded. Sends nothing.

        Raises:
            TypeError: a parameter is not sharded.
            ValueError: the model has no such parameter, of another shape, or sharded otherwise than by rows.
        """
        have, parts = dict(model.named_parameters()), {}
        for name in masks.shapes:
            if name not in have:
                raise ValueError(f"masks must be of this model, which has no parameter {name!r}")
            if not is_sharded(have[name]):
                raise TypeError(f"all parameters of masks must be DTensors, or none; {name!r} is a plain tensor")
            parts[name] = part_of(have[name], repr(name))
        here = placed(model, masks)
        return cls({name: here.picks(name) for name in parts}, parts, **_about(masks))

    @classmethod
    def from_masks(cls, masks: Mapping[str, Any]) -> "ShardedMaskSet":
        """From bool DTensors by parameter name, as ``dtensors()`` gives them."""
        for name, mask in masks.items():
            if not is_sharded(mask) or mask.dtype != torch.bool:
                raise TypeError(f"masks[{name!r}] must be a bool DTensor; got {type(mask).__name__} of {mask.dtype}")
        parts = {name: part_of(mask, f"masks[{name!r}]") for name, mask in masks.items()}
        return cls({name: _picks.pack(local(mask).reshape(-1)) for name, mask in masks.items()}, parts)

    def dtensors(self, like: nn.Module | Mapping[str, Tensor]) -> dict[str, Any]:
        """``{name: bool DTensor}`` for ``torch.distributed.checkpoint``, a byte a weight.

        Args:
            like: the model, or its scores: DTensors that are sharded as the masks are.
        """
        found = dict(like.named_parameters()) if isinstance(like, nn.Module) else like
        for name, part in self.parts.items():
            if not is_sharded(found[name]) or part_of(found[name]) != part:
                raise ValueError(f"like[{name!r}] must be sharded as the masks are, {part}; it is not")
        return {name: whole_like(self[name].contiguous(), found[name]) for name in self.names}

    def whole(self) -> MaskSet:
        """The set of all ranks, on each of them; all ranks must call this.

        Sends N / 8 bytes of N weights to each rank, and takes memory for the set in the smaller form (2 bytes a
        selected weight, or N / 8 bytes) and a byte for each weight of the largest parameter.
        """
        bits = {name: _gathered(self._given(name), part) for name, part in self.parts.items()}
        shapes = {name: part.shape for name, part in self.parts.items()}
        return MaskSet(bits, shapes, **_about(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole set as ``MaskSet.save`` does, on the first rank of the mesh; all ranks must call this.

        Raises:
            OSError: the folder does not exist or cannot be written (RuntimeError on the other ranks).
        """
        whole = self.whole()
        error: Exception | None = None
        mesh = next((part.mesh for part in self.parts.values()), None)
        if mesh is None or not any(mesh.get_coordinate()):
            try:
                whole.save(path)
            except Exception as caught:  # whatever it is, the other ranks wait for word of it
                error = caught
        _ranks.all_raise(error, "MaskSet.save", [] if mesh is None else mesh.get_all_groups())

    def random_like(self, seed: int) -> "ShardedMaskSet":
        """This rank's part of ``whole().random_like(seed)``; all ranks must call this."""
        whole = self.whole().random_like(seed)
        bits = {}
        for name, part in self.parts.items():
            bits[name] = _picks.pack(whole[name].reshape(-1)[part.begin : part.end])
        return ShardedMaskSet(bits, self.parts, base=self.base)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ShardedMaskSet) and self.parts != other.parts:
            return False
        return super().__eq__(other)

    __hash__ = None

    def _combine(self, other: MaskSet, operation: Callable[[Tensor, Tensor], Tensor]) -> MaskSet:
        if isinstance(other, ShardedMaskSet) and self.parts != other.parts:
            name = next(
                (n for n in [*self.parts, *other.parts] if self.parts.get(n) != other.parts.get(n)), "the order"
            )
            raise ValueError(f"mask sets must be sharded alike; they differ at {name!r}")
        return super()._combine(other, operation)

    def _with(self, bits: Mapping[str, Bits], **about: Any) -> "ShardedMaskSet":
        return ShardedMaskSet(bits, self.parts, **about)

    def __repr__(self) -> str:
        return f"Sharded{super().__repr__()[:-1]}, on this rank)"


def _about(masks: MaskSet) -> dict[str, Any]:
    """What a set is of, beside its bits."""
    return {name: getattr(masks, name) for name in ("zero_score_selected", "base", "criterion")}


def group_of(parts: Mapping[str, Part]) -> dist.ProcessGroup:
    """The ranks among which the rows of all these parameters are dealt.

    Raises:
        ValueError: they are not the same for all.
    """
    first_name, first = next(iter(parts.items()))
    for name, part in parts.items():
        if (part.mesh, part.dim) != (first.mesh, first.dim):
            raise ValueError(
                f"all parameters must be sharded over the same ranks; {name!r} is sharded over dimension {part.dim} of "
                f"{part.mesh}, {first_name!r} over dimension {first.dim} of {first.mesh}"
            )
    return first.group


def _gathered(bits: Bits, part: Part) -> Bits:
    """Of a whole parameter, from every rank's part of it."""
    if part.dim is None:
        return bits
    ranks = [part.of_rank(rank) for rank in range(part.mesh.size(part.dim))]
    mine = _picks.to_bits(bits, part.end - part.begin).to(_ranks.device_of(part.group))
    padded = torch.zeros(packed_bytes(ranks[0].end), dtype=torch.uint8, device=mine.device)  # no rank has more rows
    padded[: len(mine)] = mine
    copies = [torch.empty_like(padded) for _ in ranks]
    dist.all_gather(copies, padded, group=part.group)
    mask = torch.cat([reference.unpack(c, of.end - of.begin) for c, of in zip(copies, ranks, strict=True)])
    return _picks.compact(_picks.pack(mask.to(_device(bits))), len(mask))


def _device(bits: Bits) -> torch.device:
    return bits[0].device if isinstance(bits, tuple) else bits.device
