"""Sets of critical weights: selected from scores, combined, saved, and used to rewind a model."""

import fnmatch
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from cwfast import ops, reference
from cwfast._parameters import Initial, initial_values
from cwfast.checkpoint.files import atomic_write
from cwfast.errors import CheckpointError
from cwfast.ops.select import packed_bytes

FORMAT = "cwfast-mask/1"
Scope = str | Mapping[str, float]


class MaskSet:
    """Which weights are selected: per parameter, a set of entries of its flattened tensor (row-major).

    ``masks[name]`` is a bool tensor of the parameter's shape. Sets of the same parameters combine by ``&``, ``|``,
    ``-`` and ``^``. Selected entries are "on"; parameters of which none is selected are still named.

    Args:
        bits: ``{name: packed bits}`` as in ``cwfast.ops.Selection``, all on one device.
        shapes: ``{name: shape}``, the same names.
        zero_score_selected: see ``select``.

    Raises:
        ValueError: names, lengths or padding do not fit.
    """

    def __init__(
        self, bits: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], *, zero_score_selected: int = 0
    ) -> None:
        if list(bits) != list(shapes):
            raise ValueError(
                f"bits and shapes must have the same names; got {list(bits)[:3]}... and {list(shapes)[:3]}..."
            )
        self.bits = dict(bits)
        self.shapes = {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
        for name, packed in self.bits.items():
            numel = int(np.prod(self.shapes[name], dtype=np.int64))
            if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(numel),):
                raise ValueError(
                    f"bits[{name!r}] must be uint8 of {packed_bytes(numel)} bytes for shape {self.shapes[name]}; "
                    f"got {packed.dtype} of shape {tuple(packed.shape)}"
                )
            if reference.unpack(packed[-8:], 64)[numel - (packed_bytes(numel) * 8 - 64) :].any():
                raise ValueError(f"bits[{name!r}] must be zero past the last of {numel} entries; some are set")
        self.counts = {name: _popcount(packed) for name, packed in self.bits.items()}
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
        return list(self.bits)

    @property
    def total(self) -> int:
        """How many weights are selected."""
        return sum(self.counts.values())

    @property
    def numel(self) -> int:
        """How many weights there are to select from."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes.values())

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return reference.unpack(self.bits[name], int(np.prod(shape, dtype=np.int64))).reshape(shape)

    def __repr__(self) -> str:
        share = self.total / self.numel if self.numel else 0.0
        return f"MaskSet({self.total:,} of {self.numel:,} weights, {share:.3%}, in {len(self.bits)} parameters)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self.shapes == other.shapes and all(torch.equal(self.bits[n], other.bits[n]) for n in self.bits)

    __hash__ = None  # type: ignore[assignment]

    def indices(self, name: str) -> Tensor:
        """Selected flat indices of one parameter: int64, ascending."""
        return self[name].reshape(-1).nonzero().reshape(-1)

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
        return MaskSet({n: operation(self.bits[n], other.bits[n]) for n in self.bits}, self.shapes)

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
        for name, packed in self.bits.items():
            numel = int(np.prod(self.shapes[name], dtype=np.int64))
            mask = torch.zeros(numel, dtype=torch.bool)
            mask[torch.from_numpy(generator.choice(numel, self.counts[name], replace=False, shuffle=False))] = True
            bits[name] = reference.pack(mask).to(packed.device)
        return MaskSet(bits, self.shapes)

    def to(self, device: torch.device | str) -> "MaskSet":
        """The same set on another device."""
        return MaskSet(
            {name: packed.to(device) for name, packed in self.bits.items()},
            self.shapes,
            zero_score_selected=self.zero_score_selected,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all: per parameter ``<name>/low`` uint16, the positions inside
        blocks of 65,536 entries, and ``<name>/offset`` int64, where each block's begin (2 bytes a selected weight).

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        from safetensors.torch import save

        tensors = {}
        for name in self.bits:
            indices = self.indices(name).cpu()
            blocks = -(-int(np.prod(self.shapes[name], dtype=np.int64)) // reference.BLOCK)
            edges = torch.arange(blocks + 1, dtype=torch.int64) * reference.BLOCK
            tensors[f"{name}/low"] = (indices % reference.BLOCK).to(torch.uint16)
            tensors[f"{name}/offset"] = torch.searchsorted(indices, edges)
        metadata = {
            "format": FORMAT,
            "shapes": json.dumps({name: list(shape) for name, shape in self.shapes.items()}),
            "sha256": _digest(tensors),
            "zero_score_selected": str(self.zero_score_selected),
        }
        with atomic_write(path) as temporary:
            temporary.write_bytes(save(tensors, metadata=metadata))  # an OSError stays one, unlike from save_file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MaskSet":
        """Read what ``save`` wrote; everything in it is checked.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is not such a file, or broken; the message says where.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CheckpointError(f"{path} must be a safetensors file; {error}") from error
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} must be a mask file of format {FORMAT}; got {metadata.get('format')!r}")
        if metadata.get("sha256") != _digest(tensors):
            raise CheckpointError(f"{path} must hold the data it was written with; its SHA-256 differs")
        shapes = _read_shapes(path, metadata.get("shapes", ""))
        expected = {f"{name}/{part}" for name in shapes for part in ("low", "offset")}
        if set(tensors) != expected:
            raise CheckpointError(
                f"{path} must hold low and offset of each parameter; {sorted(expected ^ set(tensors))[:3]}"
            )
        bits = {}
        for name, shape in shapes.items():
            low, offset = tensors[f"{name}/low"], tensors[f"{name}/offset"]
            bits[name] = _bits_of(path, name, int(np.prod(shape, dtype=np.int64)), low, offset)
        zeros = metadata.get("zero_score_selected", "")
        if not zeros.isdecimal() or len(zeros) > 19:
            raise CheckpointError(f"{path} must state zero_score_selected as a number; got {zeros!r}")
        return cls(bits, shapes, zero_score_selected=int(zeros))


def select(
    scores: Mapping[str, Tensor],
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
        scores: ``{name: scores}``, as ``SaliencyScorer.scores`` gives them; at least 0.
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
        ValueError: rate and k do not fit scope or each other, or scores are NaN or negative.
    """
    groups = _groups(scores, rate, k, scope, exclude)
    shapes = {name: score.shape for name, score in scores.items()}
    bits = {
        name: torch.zeros(packed_bytes(s.numel()), dtype=torch.uint8, device=s.device) for name, s in scores.items()
    }
    zeros = 0
    for names, count in groups:
        chosen = [scores[name] for name in names]
        selection = ops.select_topk(chosen, count, nan=nan, backend=backend)
        bits.update(zip(names, selection.bits, strict=True))
        if count and selection.threshold == 0:
            zeros += count - sum(int((score > 0).sum()) for score in chosen)
    masks = MaskSet(bits, shapes, zero_score_selected=zeros)
    if zeros > 0.01 * masks.total:
        competing = [scores[name] for names, _ in groups for name in names]
        useful, numel = sum(int((score > 0).sum()) for score in competing), sum(score.numel() for score in competing)
        warnings.warn(
            f"{zeros} of {masks.total} selected weights have score 0, which ranks nothing; the largest useful rate is "
            f"{useful / numel:.6f} ({useful} weights have a positive score)",
            stacklevel=2,
        )
    return masks


def rewind_(model: nn.Module, masks: MaskSet, initial: Initial, *, backend: str = "auto") -> nn.Module:
    """Put the selected weights back to their initial values, in place; the others are not touched.

    Args:
        model: the trained model.
        masks: of this model.
        initial: module, mapping (``state_dict``) or safetensors file with the initial weights; cast to the model's
            dtype and device.
        backend: see ``cwfast.ops.rewind_``.

    Returns:
        ``model``.

    Raises:
        ValueError: ``masks`` or ``initial`` is not of this model; nothing has been changed.
    """
    parameters = matching(model, masks)
    values = initial_values(initial, parameters)
    weights = [parameter.detach() for parameter in parameters.values()]
    before = [values[name].to(weight) for (name, weight) in zip(parameters, weights, strict=True)]
    packed = [masks.bits[name].to(weight.device) for name, weight in zip(parameters, weights, strict=True)]
    ops.rewind_(weights, before, packed, backend=backend)
    return model


def matching(model: nn.Module, masks: MaskSet) -> dict[str, nn.Parameter]:
    """The parameters that ``masks`` names, in its order.

    Raises:
        ValueError: the model has no such parameter, or of another shape.
    """
    have = dict(model.named_parameters())
    for name, shape in masks.shapes.items():
        if name not in have:
            raise ValueError(f"masks must be of this model, which has no parameter {name!r}")
        if tuple(have[name].shape) != shape:
            raise ValueError(
                f"masks must be of this model: {name!r} has shape {tuple(have[name].shape)} there, {shape} here"
            )
    return {name: have[name] for name in masks.shapes}


def _groups(
    scores: Mapping[str, Tensor],
    rate: float | None,
    k: int | None,
    scope: Scope,
    exclude: Sequence[str] | None,
) -> list[tuple[list[str], int]]:
    """Which parameters compete with one another, and for how many places."""
    names = [name for name in scores if not _first_match(name, exclude or ())]
    if isinstance(scope, Mapping):
        if rate is not None or k is not None:
            raise ValueError("scope={pattern: rate} holds the rates; rate and k must not be given beside it")
        pattern_of = {name: _first_match(name, list(scope)) for name in names}
        return [
            ([name], _count(scope[pattern], scores[name].numel())) for name, pattern in pattern_of.items() if pattern
        ]
    if (rate is None) == (k is None):
        raise ValueError(f"either rate or k must be given; got rate={rate}, k={k}")
    if scope == "layer":
        if rate is None:
            raise ValueError("scope 'layer' takes a rate; got k")
        return [([name], _count(rate, scores[name].numel())) for name in names]
    if scope != "global":
        raise ValueError(f"scope must be 'global', 'layer' or a mapping {{pattern: rate}}; got {scope!r}")
    numel = sum(scores[name].numel() for name in names)
    return [(names, _count(rate, numel) if k is None else k)]  # type: ignore[arg-type]


def _first_match(name: str, patterns: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def _count(rate: float, numel: int) -> int:
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie between 0 and 1; got {rate}")
    return int(Fraction(str(rate)) * numel)  # the decimal that was written: 0.29 of 100 is 29


def _popcount(packed: Tensor) -> int:
    counts = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int64, device=packed.device)
    return int((torch.bincount(packed, minlength=256) * counts).sum()) if len(packed) else 0


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_shapes(path: str | os.PathLike[str], text: str) -> dict[str, tuple[int, ...]]:
    try:
        shapes = json.loads(text)
        good = isinstance(shapes, dict) and all(
            isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
            for shape in shapes.values()
        )
    except (ValueError, RecursionError):  # also numbers of too many digits and brackets nested too deeply
        good = False
    if not good:
        raise CheckpointError(f"{path} must state shapes as a JSON object of lists of sizes; got {text[:80]!r}")
    for name, shape in shapes.items():
        entries = 1
        for size in shape:
            entries *= max(size, 1)  # Python integers: no overflow, and none that a size 0 would hide
        if entries >= 1 << 62:
            raise CheckpointError(f"{path} must name tensors below 2**62 entries; {name!r} has shape {shape}")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _bits_of(path: str | os.PathLike[str], name: str, numel: int, low: Tensor, offset: Tensor) -> Tensor:
    """Packed bits of one parameter, from a file's low and offset, which are checked first."""
    blocks = -(-numel // reference.BLOCK)
    good = low.dtype == torch.uint16 and low.ndim == 1 and offset.dtype == torch.int64 and offset.shape == (blocks + 1,)
    good = good and bool(offset[0] == 0 and offset[-1] == len(low) and (offset.diff() >= 0).all())
    if good:
        indices = reference.indices_of(low, offset, numel)
        good = bool((indices.diff() > 0).all()) and (len(indices) == 0 or int(indices[-1]) < numel)
    if not good:
        raise CheckpointError(
            f"{path} must list ascending indices below {numel} for {name!r}, by blocks of {reference.BLOCK}"
        )
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[indices] = True
    return reference.pack(mask)
