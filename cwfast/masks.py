"""Sets of critical weights: selected from scores, combined, saved, and used to rewind a model."""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cwfast import _mask_files, _picks, _streaming, ops, reference
from cwfast._parameters import Initial, check_apart, check_shapes, initial_values
from cwfast._scopes import Scope, groups_of
from cwfast.checkpoint import Checkpoint
from cwfast.errors import CheckpointError
from cwfast.ops.rewind import Bits
from cwfast.ops.select import packed_bytes

Scores = Mapping[str, Tensor] | str | os.PathLike[str]


class Count(NamedTuple):
    """Selected weights, and how many there are to select from."""

    selected: int
    numel: int


class MaskSet:
    """Which weights are selected: per parameter, a set of entries of its flattened tensor (row-major).

    ``masks[name]`` is a bool tensor of the parameter's shape, ``masks.bits[name]`` packed bits, ``masks.picks(name)``
    the smaller of packed bits and block list (2 bytes a selected weight); a form that was not given is made when first
    asked for, and kept. Sets of the same parameters combine by ``&``, ``|``, ``-`` and ``^``. Selected entries are
    "on"; parameters of which none is selected are still named.

    Args:
        bits: ``{name: packed bits | (low, offset)}`` as ``cwfast.ops.rewind_`` takes them, all on one device.
        shapes: ``{name: shape}``, the same names.
        zero_score_selected: see ``select``.

    Raises:
        ValueError: names, lengths, padding, or a list's order do not fit.
    """

    def __init__(
        self, bits: Mapping[str, Bits], shapes: Mapping[str, Sequence[int]], *, zero_score_selected: int = 0
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

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor]) -> "MaskSet":
        """From bool tensors by parameter name."""
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"masks[{name!r}] must be bool; got {mask.dtype}")
        return cls({n: reference.pack(mask) for n, mask in masks.items()}, {n: mask.shape for n, mask in masks.items()})

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

    def counts_by(self, group: str) -> dict[str, Count]:
        """Selected and all weights by part of the model.

        Args:
            group: "layer": the name up to its first number ("model.layers.3"), or without its last part where there
                is none ("head" of "head.weight"). "kind": the name with each number as ``*``
                ("model.layers.*.mlp.up_proj.weight").

        Raises:
            ValueError: another group.
        """
        if group not in ("layer", "kind"):
            raise ValueError(f"group must be 'layer' or 'kind'; got {group!r}")
        found: dict[str, Count] = {}
        for name, numel in self._numel.items():
            key = _layer_of(name) if group == "layer" else _kind_of(name)
            before = found.get(key, Count(0, 0))
            found[key] = Count(before.selected + self.counts[name], before.numel + numel)
        return found

    def summary(self, group: str = "layer") -> str:
        """A text table of ``counts_by``: selected, all, share, and share relative to the whole set's."""
        rows = [*self.counts_by(group).items(), ("all", Count(self.total, self.numel))]
        width = max(len(group), *(len(key) for key, _ in rows))
        whole = self.total / self.numel if self.total else math.nan
        lines = [f"{group:<{width}}  {'selected':>15}  {'weights':>17}  {'share':>9}  {'to all':>7}"]
        for key, (selected, numel) in rows:
            share = selected / numel if numel else 0.0
            relative = f"{share / whole:.2f}" if self.total else "-"
            lines.append(f"{key:<{width}}  {selected:>15,}  {numel:>17,}  {share:>9.4%}  {relative:>7}")
        if self.zero_score_selected:
            lines.append(f"{self.zero_score_selected:,} of the selected weights had score 0")
        return "\n".join(lines)

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
        return MaskSet({n: operation(a, b) for n, (a, b) in zip(names, self._pairs(other), strict=True)}, self.shapes)

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
        return MaskSet(bits, self.shapes)

    def to(self, device: torch.device | str) -> "MaskSet":
        """The same set on another device."""
        return MaskSet(
            {name: _picks.to_device(self._given(name), device) for name in self.shapes},
            self.shapes,
            zero_score_selected=self.zero_score_selected,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all: per parameter ``<name>/low`` uint16, the positions inside
        blocks of 65,536 entries, and ``<name>/offset`` int64, where each block's begin (2 bytes a selected weight);
        from 1/16 of the entries on ``<name>/bits``, packed.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        picks = {name: self._given(name) for name in self.shapes}
        _mask_files.save(path, picks, self.shapes, self.zero_score_selected)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MaskSet":
        """Read what ``save`` wrote; everything in it is checked.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is not such a file, or broken; the message says where.
        """
        picks, shapes, zeros = _mask_files.load(path)
        try:
            return cls(picks, shapes, zero_score_selected=zeros)
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


def select(
    scores: Scores,
    *,
    rate: float | None = None,
    k: int | None = None,
    scope: Scope = "global",
    exclude: Sequence[str] | None = None,
    nan: str = "raise",
    backend: str = "auto",
) -> MaskSet:
    """The exactly ``k = floor(rate * N)`` weights with the largest scores; ties to the lowest (parameter, index).

    Args:
        scores: ``{name: scores}``, as ``SaliencyScorer.scores`` gives them; at least 0. Or a safetensors file or folder
            of them, on the CPU: it is read in pieces, so that it may be larger than memory, and gives the same masks.
        rate: share of the N weights that ``exclude`` leaves, 0 to 1; exact (0.3 of 10 is 3). Or
        k: how many.
        scope: "global": the largest of all. "layer": the rate in each parameter. ``{pattern: rate}``: each parameter
            takes the rate of the first ``fnmatch`` pattern that its name matches; unmatched ones select nothing.
        exclude: ``fnmatch`` patterns of parameters of which nothing is selected.
        nan: "raise" or "skip" (NaN is never selected).
        backend: see ``cwfast.ops.select_topk``.

    Returns:
        A MaskSet over all parameters of ``scores``. Its ``zero_score_selected`` counts selected weights whose score is
        exactly 0, which say nothing; above 1% of the selection there is a warning that names the largest useful rate.

    Raises:
        ValueError: rate and k do not fit scope or each other, a pattern of scope matches nothing, or scores are NaN or
            negative.
    """
    if not isinstance(scores, Mapping | str | os.PathLike):
        raise TypeError(f"scores must be {{name: tensor}} or a safetensors file or folder; got {type(scores).__name__}")
    source = scores if isinstance(scores, Mapping) else Checkpoint(scores)
    shapes = {n: tuple(s.shape) for n, s in source.items()} if isinstance(source, Mapping) else source.shapes
    groups = groups_of({name: math.prod(shape) for name, shape in shapes.items()}, rate, k, scope, exclude)
    picks: dict[str, Bits] = {}
    zeros, poorest = 0, (math.inf, "", 0)  # share of positive scores, where, how many
    for names, count in groups:
        found, threshold = _select_group(source, names, count, nan, backend)
        picks.update(zip(names, found, strict=True))
        if count and threshold == 0:
            useful = _positive(source, names)
            zeros += count - useful
            share = useful / sum(math.prod(shapes[name]) for name in names)
            poorest = min(poorest, (share, f" of {names[0]!r}" if len(groups) > 1 else "", useful))
    for name, shape in shapes.items():
        if name not in picks:  # excluded, or no pattern matches
            device = scores[name].device if isinstance(scores, Mapping) else "cpu"
            picks[name] = torch.zeros(packed_bytes(math.prod(shape)), dtype=torch.uint8, device=device)
    masks = MaskSet({name: picks[name] for name in shapes}, shapes, zero_score_selected=zeros)
    if zeros > 0.01 * masks.total:
        share, where, useful = poorest
        warnings.warn(
            f"{zeros} of {masks.total} selected weights have score 0, which ranks nothing; the largest useful "
            f"rate{where} is {share:.6f} ({useful} weights have a positive score)",
            stacklevel=2,
        )
    return masks


def rewind_(model: nn.Module, masks: MaskSet, initial: Initial, *, backend: str = "auto") -> nn.Module:
    """Put the selected weights back to their initial values, in place; the others are not touched.

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
    parameters = matching(model, masks)
    weights = [parameter.detach() for parameter in parameters.values()]
    picks = [
        _picks.to_device(masks.picks(name), weight.device) for name, weight in zip(parameters, weights, strict=True)
    ]
    if isinstance(initial, str | os.PathLike):
        values = _streamed(model, masks, parameters, Checkpoint(initial))
        ops.scatter_(weights, picks, values, backend=backend)
    else:
        check_apart(initial, parameters)
        source = initial_values(initial, parameters)
        before = [source[name].to(weight) for (name, weight) in zip(parameters, weights, strict=True)]
        ops.rewind_(weights, before, picks, backend=backend)
    return model


def _streamed(
    model: nn.Module, masks: MaskSet, parameters: Mapping[str, nn.Parameter], source: Checkpoint
) -> list[Tensor]:
    """The initial values of the selected entries; a tied weight may have any of its names in the file."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    names = {n: next((a for a in aliases[id(p)] if a in source), n) for n, p in parameters.items()}
    shapes = source.shapes
    check_shapes({name: shapes[stored] for name, stored in names.items() if stored in shapes}, parameters)
    picks = {name: _picks.to_device(masks.picks(name), "cpu") for name in parameters}
    return _streaming.gather(source, {n: p.detach() for n, p in parameters.items()}, picks, names)


def matching(model: nn.Module, masks: MaskSet) -> dict[str, nn.Parameter]:
    """The parameters that ``masks`` names, in its order.

    Raises:
        TypeError: ``masks`` is no MaskSet.
        ValueError: the model has no such parameter, or of another shape.
    """
    if not isinstance(masks, MaskSet):
        raise TypeError(
            f"masks must be a MaskSet (select, MaskSet.load, MaskSet.from_masks); got {type(masks).__name__}"
        )
    have = dict(model.named_parameters())
    for name, shape in masks.shapes.items():
        if name not in have:
            raise ValueError(f"masks must be of this model, which has no parameter {name!r}")
        if tuple(have[name].shape) != shape:
            raise ValueError(
                f"masks must be of this model: {name!r} has shape {tuple(have[name].shape)} there, {shape} here"
            )
    return {name: have[name] for name in masks.shapes}


def _select_group(
    scores: Mapping[str, Tensor] | Checkpoint, names: list[str], k: int, nan: str, backend: str
) -> tuple[Sequence[Bits], float]:
    if isinstance(scores, Checkpoint):
        return _streaming.select_topk(scores, names, k, nan, backend)
    try:
        selection = ops.select_topk([scores[name] for name in names], k, nan=nan, backend=backend)
    except (TypeError, ValueError) as error:  # the ops know places, not names
        message = re.sub(r"scores\[(\d+)\]", lambda place: f"scores[{names[int(place[1])]!r}]", str(error))
        raise type(error)(message) from None
    return selection.bits, selection.threshold


def _positive(scores: Mapping[str, Tensor] | Checkpoint, names: list[str]) -> int:
    if isinstance(scores, Checkpoint):
        return _streaming.positive(scores, names)
    return sum(int((scores[name] > 0).sum()) for name in names)


def _layer_of(name: str) -> str:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1]) or name


def _kind_of(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _device(bits: Bits) -> torch.device:
    return bits[0].device if isinstance(bits, tuple) else bits.device
