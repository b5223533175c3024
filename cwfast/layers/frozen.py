"""Entries of a weight that do not count: they are frozen, so that a sample's gradient is that of the others."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Frozen:
    """Some entries of a contiguous weight, or of a view of one, by flat index.

    Args:
        shape: of the weight.
        indices: ``[k]`` int64, ascending.
    """

    def __init__(self, shape: Sequence[int], indices: Tensor) -> None:
        self.shape, self.indices = tuple(shape), indices
        self._windowed: Tensor | None = None

    def clear_(self, gradients: Tensor) -> Tensor:
        """Zero them in ``[B, *shape]``, or in one contiguous gradient ``[*shape]``, in place."""
        flat = gradients.view(-1, math.prod(self.shape))
        flat.index_fill_(1, self.indices, 0)
        return gradients

    def as_windows(self) -> Tensor:
        """The indices where ``[O, C, *kernel]`` lies as ``[O, K C]``: a window's positions, channels last."""
        if self._windowed is None:
            channels, kernel = self.shape[1], math.prod(self.shape[2:])
            row, inner = self.indices // (channels * kernel), self.indices % (channels * kernel)
            moved = row * (channels * kernel) + inner % kernel * channels + inner // kernel
            self._windowed = moved.sort().values
        return self._windowed

    def among(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Where in ``[len(rows), width]``, whose row i is row ``rows[i]`` of the weight, they lie: rows and columns."""
        begin = torch.searchsorted(self.indices, rows * width)
        counts = torch.searchsorted(self.indices, (rows + 1) * width) - begin
        places = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        first = (begin - counts.cumsum(0) + counts).repeat_interleave(counts)
        return places, self.indices[torch.arange(len(places), device=rows.device) + first] % width
