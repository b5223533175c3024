"""Where in a weight its uses lie, and one gradient of several uses."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from cwfast.layers.outer import Lookup, Outer
from cwfast.layers.pieces import PerSample, Piece

TILE = 1 << 20  # entries of the buffer in which a sample's uses of a weight of several kinds are summed


class Place:
    """Where a view lies in a contiguous weight."""

    __slots__ = ("offset", "shape", "strides")

    def __init__(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> None:
        self.shape, self.strides, self.offset = tuple(shape), tuple(strides), offset

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Place":
        """All of a contiguous tensor of this shape."""
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        return cls(shape, strides[::-1], 0)

    @property
    def key(self) -> tuple[object, ...]:
        return self.shape, self.strides, self.offset

    def of(self, weight: Tensor) -> Tensor:
        """The view of ``weight`` or of a contiguous tensor shaped like it."""
        return weight.as_strided(self.shape, self.strides, weight.storage_offset() + self.offset)

    @property
    def extent(self) -> tuple[int, int]:
        """The half-open interval of entries that it touches."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset, self.offset + last + 1 if 0 not in self.shape else self.offset


class Mixed(Piece):
    """Several pieces of one weight, each at its place ``(shape, strides, offset)`` in it."""

    def __init__(self, placed: Sequence[tuple[Place, Piece]]) -> None:
        self.placed = placed
        self.samples = placed[0][1].samples

    def add_to(self, out: Tensor, sample: int) -> None:
        for place, piece in self.placed:
            piece.add_to(place.of(out), sample)

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        rows = max(1, TILE * len(out) // max(1, out.numel())) if out.ndim else 1
        whole = Place.whole(out.shape).key
        tiles = [(begin, min(begin + rows, len(out))) for begin in range(0, len(out), rows)] if out.ndim else []
        if len(tiles) < 2 or any(place.key != whole for place, _ in self.placed):
            super().accumulate_(out, power, factor, scale, grad, backend)
            return
        for begin, end in tiles:
            parts = [piece.narrowed(begin, end) for _, piece in self.placed]
            if any(part is None for part in parts):
                super().accumulate_(out, power, factor, scale, grad, backend)
                return
            place = Place.whole((end - begin, *out.shape[1:]))
            tile = Mixed([(place, part) for part in parts if part is not None])
            f, g = (None if x is None else x[begin:end] for x in (factor, grad))
            Piece.accumulate_(tile, out[begin:end], power, f, scale, g, backend)

    def scaled(self, coefficients: Tensor) -> "Mixed":
        return Mixed([(place, piece.scaled(coefficients)) for place, piece in self.placed])


def merged(placed: Sequence[tuple[Place, Piece]]) -> list[tuple[Place | None, Piece]]:
    """The same gradients as pieces that touch no entry in common; place None: the whole weight, in its own shape."""
    if len(placed) == 1:
        return [*placed]
    groups: dict[tuple[object, ...], tuple[Place, list[Piece]]] = {}
    for place, piece in placed:
        groups.setdefault(place.key, (place, []))[1].append(piece)
    ordered = sorted(groups.values(), key=lambda group: group[0].extent)
    apart = all(a.extent[1] <= b.extent[0] for (a, _), (b, _) in itertools.pairwise(ordered))
    together = [(place, _joined(pieces)) for place, pieces in ordered] if apart else []
    found: list[tuple[Place | None, Piece]] = [(place, piece) for place, piece in together if piece is not None]
    return found if apart and len(found) == len(together) else [(None, Mixed(placed))]


def _joined(pieces: list[Piece]) -> Piece | None:
    """One piece whose per-sample gradients are the sums of these; None where no form holds them all."""
    if len(pieces) == 1:
        return pieces[0]
    outer = [piece for piece in pieces if isinstance(piece, Outer)]
    if len(outer) == len(pieces):
        return outer[0].joined(outer[1:])
    direct = [piece.gradients for piece in pieces if isinstance(piece, PerSample)]
    if len(direct) == len(pieces):
        return PerSample(torch.stack(direct).sum(dim=0))
    lookups = [piece for piece in pieces if isinstance(piece, Lookup)]
    if len(lookups) == len(pieces) and len({piece.padding_idx for piece in lookups}) == 1:
        return lookups[0].joined(lookups[1:])
    return None
