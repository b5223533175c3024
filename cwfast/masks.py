"""Sets of critical weights: combined, counted, saved, and used to rewind a model."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cwfast import _checks, _mask_files, _mask_view, _picks, _streaming, ops, reference
from cwfast._parameters import Initial, check_apart, check_shapes, initial_values, read_like, unwrapped
from cwfast._shards import by_rows, is_sharded, local, local_like, part_of, reshard
from cwfast.checkpoint import Checkpoint
from cwfast.errors import CheckpointError
from cwfast.ops.rewind import Bits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MaskSet:
    """Which weights are selected: per parameter, a set of entries of its flattened tensor (row-major).

    ``masks[name]`` is a bool tensor of the parameter's shape, ``masks.bits[name]`` packed bits, ``masks.picks(name)``
    the smaller of packed bits and block list (2 bytes a selected weight); a form that was not given is made when first
    asked for, and kept: these tensors are the set's own, to be read only. Sets of the same parameters combine by ``&``,
    ``|``, ``-`` and ``^``. Selected entries are "on"; parameters of which none is selected are still named.

    Args:
        bits: ``{name: packed bits | (low, offset)}`` as ``cwfast.ops.rewind_`` takes them, all on one device.
        shapes: ``{name: shape}``, the same names.
        zero_score_selected: see ``select``.
        base: ``{name: SHA-256}`` of the initial tensors that the selected weights go back to, where that is known: a
            rewind on disk refuses others.
        criterion: by which the scores were made, where that is known.

    Raises:
        ValueError: names, lengths, padding, or a list's order do not fit.
    """

    def __init__(
        self,
        bits: Mapping[str, Bits],
        shapes: Mapping[str, Sequence[int]],
        *,
        zero_score_selected: int = 0,
        base: Mapping[str, str] | None = None,
        criterion: str | None = None,
    ) -> None:
        if list(bits) != list(shapes):
            raise ValueError(
                f"bits and shapes must have the same names; got {list(bits)[:3]}... and {list(shapes)[:3]}..."
            )
        self.shapes = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
        self._numel = {name: math.prod(shape) for name, shape in self.shapes.items()}
        for name, given in bits.items():
            wrong = _picks.wrong(given, self._numel[name])
            if wrong:
                raise ValueError(f"bits[{name!r}] {wrong}, for shape {self.shapes[name]}")
        self._packed = {name: given for name, given in bits.items() if not isinstance(given, tuple)}
        self._lists = {name: given for name, given in bits.items() if isinstance(given, tuple)}
        self.counts = {name: _picks.count(given) for name, given in bits.items()}
        self.zero_score_selected = zero_score_selected
        self.base = None if base is None else dict(base)
        self.criterion = criterion

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor]) -> "MaskSet":
        """From bool tensors by parameter name."""
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"masks[{name!r}] must be bool; got {mask.dtype}")
        bits = {name: reference.pack(mask) for name, mask in masks.items()}
        return MaskSet(bits, {name: mask.shape for name, mask in masks.items()})

    @property
    def names(self) -> list[str]:
        """Parameter names, in order."""
        return list(self.shapes)

    @property
    def bits(self) -> Mapping[str, Tensor]:
        """Packed bits by name, as in ``cwfast.ops.Selection``."""
        return _PackedBits(self)

    def picks(self, name: str) -> Bits:
        """What ``cwfast.ops`` takes as bits, in the smaller form: a list below 1/16 of the entries, else packed."""
        if self.counts[name] >= _picks.LIST_BELOW * self._numel[name]:
            return self.bits[name]
        if name not in self._lists:
            self._lists[name] = _picks.to_list(self._packed[name], self._numel[name])
        return self._lists[name]

    def _given(self, name: str) -> Bits:
        return self._packed[name] if name in self._packed else self._lists[name]

    @property
    def total(self) -> int:
        """How many weights are selected."""
        return sum(self.counts.values())

    @property
    def numel(self) -> int:
        """How many weights there are to select from."""
        return sum(self._numel.values())

    def __getitem__(self, name: str) -> Tensor:
        packed = _picks.to_bits(self._given(name), self._numel[name])
        return reference.unpack(packed, self._numel[name]).reshape(self.shapes[name])

    def __repr__(self) -> str:
        share = self.total / self.numel if self.numel else 0.0
        return f"MaskSet({self.total:,} of {self.numel:,} weights, {share:.3%}, in {len(self.shapes)} parameters)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return (
            list(self.shapes.items()) == list(other.shapes.items())
            and self.counts == other.counts
            and all(torch.equal(a, b) for a, b in self._pairs(other))
        )

    __hash__ = None  # type: ignore[assignment]

    def indices(self, name: str) -> Tensor:
        """Selected flat indices of one parameter: int64, ascending."""
        return _picks.to_indices(self._given(name), self._numel[name])

    def counts_by(self, group: str) -> dict[str, _mask_view.Count]:
        """Selected and all weights by part of the model.

        Args:
            group: "layer": the name up to its first number ("model.layers.3"), or without its last part where there
                is none ("head" of "head.weight"). "kind": the name with each number as ``*``
                ("model.layers.*.mlp.up_proj.weight").

        Raises:
            ValueError: another group.
        """
        return _mask_view.counts_by(group, self.counts, self._numel)

    def summary(self, group: str = "layer") -> str:
        """A text table of ``counts_by``: selected, all, share, and share relative to the whole set's."""
        return _mask_view.summary(group, self.counts_by(group), self.zero_score_selected)

    def plot(self, path: str | os.PathLike[str] | None = None, *, group: str = "layer") -> "Figure":
        """Bars of the selected share of each part of the model, as ``counts_by`` groups them.

        Args:
            path: where to write it, as png, pdf or svg by its ending; None writes nothing.
            group: "layer" or "kind"; beyond 60 parts, those that hold the most selected weights.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another group.
        """
        return _mask_view.plot(group, self.counts_by(group), path)

    def _combine(self, other: "MaskSet", operation: Callable[[Tensor, Tensor], Tensor]) -> "MaskSet":
        if not isinstance(other, MaskSet):
            return NotImplemented
        if self.shapes != other.shapes:
            name = next(
                (n for n in [*self.shapes, *other.shapes] if self.shapes.get(n) != other.shapes.get(n)), "the order"
            )
            raise ValueError(
                f"mask sets must be of the same parameters; they differ at {name!r}: "
                f"{self.shapes.get(name)} and {other.shapes.get(name)}"
            )
        names = list(self.shapes)
        bits = {n: operation(a, b) for n, (a, b) in zip(names, self._pairs(other), strict=True)}
        base = self.base if self.base == other.base else None
        return self._with(bits, base=base, criterion=self.criterion if self.criterion == other.criterion else None)

    def _with(self, bits: Mapping[str, Bits], **about: Any) -> "MaskSet":
        """Another set of the same parameters."""
        return MaskSet(bits, self.shapes, **about)

    def _pairs(self, other: "MaskSet") -> Iterator[tuple[Tensor, Tensor]]:
        """Packed bits of both, made one parameter at a time."""
        for name, numel in self._numel.items():
            yield _picks.to_bits(self._given(name), numel), _picks.to_bits(other._given(name), numel)

    def __and__(self, other: "MaskSet") -> "MaskSet":
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: "MaskSet") -> "MaskSet":
        return self._combine(other, torch.bitwise_or)

    def __xor__(self, other: "MaskSet") -> "MaskSet":
        return self._combine(other, torch.bitwise_xor)

    def __sub__(self, other: "MaskSet") -> "MaskSet":
        return self._combine(other, lambda a, b: a & ~b)

    def jaccard(self, other: "MaskSet") -> float:
        """``|A and B| / |A or B|``; 1 for two empty sets."""
        union = (self | other).total
        return (self & other).total / union if union else 1.0

    def random_like(self, seed: int) -> "MaskSet":
        """As many weights in each parameter, drawn uniformly; the same for the same seed (numpy's PCG64)."""
        generator = np.random.default_rng(seed)
        bits = {}
        for name, numel in self._numel.items():
            mask = torch.zeros(numel, dtype=torch.bool)
            mask[torch.from_numpy(generator.choice(numel, self.counts[name], replace=False, shuffle=False))] = True
            bits[name] = reference.pack(mask).to(_device(self._given(name)))
        return MaskSet(bits, self.shapes, base=self.base)

    def to(self, device: torch.device | str) -> "MaskSet":
        """The same set on another device."""
        picks = {name: _picks.to_device(self._given(name), device) for name in self.shapes}
        zeros = self.zero_score_selected
        return self._with(picks, zero_score_selected=zeros, base=self.base, criterion=self.criterion)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all: per parameter ``<name>/low`` uint16, the positions inside
        blocks of 65,536 entries, and ``<name>/offset`` int64, where each block's begin (2 bytes a selected weight);
        from 1/16 of the entries on ``<name>/bits``, packed.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        picks = {name: self._given(name) for name in self.shapes}
        _mask_files.save(path, picks, self.shapes, self.zero_score_selected, self.base, self.criterion)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MaskSet":
        """Read what ``save`` wrote; everything in it is checked.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is not such a file, or broken; the message says where.
        """
        picks, file = _mask_files.load(path)
        try:
            return MaskSet(
                picks,
                file.shapes,
                zero_score_selected=file.zero_score_selected,
                base=file.base,
                criterion=file.criterion,
            )
        except ValueError as error:
            raise CheckpointError(f"{path} must hold the masks that its shapes promise; {error}") from error


class _PackedBits(Mapping[str, Tensor]):
    """A MaskSet's packed bits, made when asked for."""

    def __init__(self, masks: MaskSet) -> None:
        self._masks = masks

    def __getitem__(self, name: str) -> Tensor:
        masks = self._masks
        if name not in masks._packed:
            masks._packed[name] = _picks.to_bits(masks._lists[name], masks._numel[name])
        return masks._packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks.shapes)

    def __len__(self) -> int:
        return len(self._masks.shapes)


def rewind_(model: nn.Module, masks: MaskSet, initial: Initial, *, backend: str = "auto") -> nn.Module:
    """Put the selected weights back to their initial values, in place; the others are not touched.

    Of a sharded model (FSDP2, tensor parallelism), each rank writes its own part. Where that is a range of rows, it
    reads nothing else of ``initial``.

    Args:
        model: the trained model.
        masks: of this model.
        initial: module, mapping (``state_dict``), or safetensors file or folder with the initial weights (read once, in
            pieces, of which the selected values are kept); cast to the model's dtype and device.
        backend: see ``cwfast.ops.rewind_``.

    Returns:
        ``model``.

    Raises:
        ValueError: ``masks`` or ``initial`` is not of this model, or ``initial`` is the model's own memory; nothing has
            been changed.
    """
    masks = placed(model, masks)
    parameters = matching(model, masks, sharded=True)
    weights_of = {name: local(parameter) for name, parameter in parameters.items()}
    for name, weight in weights_of.items():  # all, before any is written
        _checks.written(name, weight)
    if isinstance(initial, str | os.PathLike):
        compact = True
        values = dict(zip(parameters, streamed(model, masks, parameters, Checkpoint(initial)), strict=True))
    else:
        compact = False
        check_apart(initial, parameters)
        values = initial_values(initial, parameters)
    for device in dict.fromkeys(weight.device for weight in weights_of.values()):
        here = {name: weight for name, weight in weights_of.items() if weight.device == device}
        picks = [_picks.to_device(masks.picks(name), device) for name in here]
        weights, before = list(here.values()), [values[name].to(weight) for name, weight in here.items()]
        if compact:
            ops.scatter_(weights, picks, before, backend=backend)
        else:
            ops.rewind_(weights, before, picks, backend=backend)
    return model


def streamed(
    model: nn.Module, masks: MaskSet, parameters: Mapping[str, nn.Parameter], source: Checkpoint
) -> list[Tensor]:
    """The initial values of the selected entries, in the file's dtypes on the CPU; everything is read once, of rows
    that are dealt to ranks this rank's.

    A tied weight may have any of its names in the file.

    Raises:
        ValueError: a name is missing or a shape differs.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    names = {n: next((a for a in aliases[id(p)] if a in source), n) for n, p in parameters.items()}
    shapes = {name: source.entry(stored).shape for name, stored in names.items() if stored in source}
    check_shapes(shapes, parameters)
    picks = {name: _picks.to_device(masks.picks(name), "cpu") for name in parameters}
    rows = {name: part_of(p, repr(name)) for name, p in parameters.items() if is_sharded(p) and by_rows(p)}
    other = [name for name, p in parameters.items() if is_sharded(p) and name not in rows]
    ranges = {name: (part.begin, part.end) for name, part in rows.items()}
    streams = {name: bits for name, bits in picks.items() if name not in other}
    found = dict(zip(streams, _streaming.gather(source, streams, names, ranges), strict=True))
    for name in other:
        found[name] = ops.gather([read_like(source, names[name], parameters[name])], [picks[name]])[0]
    return [found[name] for name in parameters]


def placed(model: nn.Module, masks: MaskSet) -> MaskSet:
    """The set of the entries that this rank has: of parameters that are sharded, its part of a whole set.

    Raises:
        ValueError: such a parameter has another shape, or is sharded in another way than by dimensions.
    """
    reshard(model)
    if not isinstance(masks, MaskSet):
        return masks
    parameters = {name: p for name, p in model.named_parameters() if is_sharded(p) and name in masks.shapes}
    if not parameters:
        return masks
    from cwfast._sharded_masks import ShardedMaskSet  # built on this module; for those who shard

    if isinstance(masks, ShardedMaskSet):
        return masks
    check_shapes(masks.shapes, parameters, "masks")
    bits, shapes = {name: masks.picks(name) for name in masks.names}, dict(masks.shapes)
    for name, parameter in parameters.items():
        mask = local_like(masks[name], parameter, repr(name))
        shapes[name] = tuple(mask.shape)
        bits[name] = _picks.compact(_picks.pack(mask.reshape(-1)), mask.numel())
    return MaskSet(bits, shapes)


def matching(model: nn.Module, masks: MaskSet, *, sharded: bool = False) -> dict[str, nn.Parameter]:
    """The parameters that ``masks`` names, in its order.

    Args:
        model: the model.
        masks: as ``placed`` gives them, if ``sharded``.
        sharded: whether DTensors are among what the caller can take.

    Raises:
        TypeError: ``masks`` is no MaskSet, or a parameter is a wrapper of other tensors (DTensor, quantized).
        ValueError: the model has no such parameter, or of another shape.
    """
    if not isinstance(masks, MaskSet):
        raise TypeError(
            f"masks must be a MaskSet (select, MaskSet.load, MaskSet.from_masks); got {type(masks).__name__}"
        )
    have = dict(model.named_parameters())
    for name, shape in masks.shapes.items():
        if name not in have:
            inside = unwrapped(model) is not model
            hint = f"; masks of the module inside its {type(model).__name__} go with that module" if inside else ""
            raise ValueError(f"masks must be of this model, which has no parameter {name!r}{hint}")
        if is_traceable_wrapper_subclass(have[name]) and not (sharded and is_sharded(have[name])):
            raise TypeError(  # it has no memory of its own to write into
                f"parameters must be plain tensors; {name!r} is a {type(have[name].data).__name__}"
            )
        if (found := tuple(local(have[name]).shape)) != shape:
            raise ValueError(f"masks must be of this model: {name!r} has shape {found} there, {shape} here")
    return {name: have[name] for name in masks.shapes}


def _device(bits: Bits) -> torch.device:
    return bits[0].device if isinstance(bits, tuple) else bits.device
