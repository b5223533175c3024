"""Which rows of a layer's tensors belong to which sample."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor


class Batch:
    """The samples of one or several forward passes."""

    def __init__(self, size: int | None, cu_seqlens: Tensor | None, valid_targets: int | None) -> None:
        self.size, self.cu_seqlens, self.valid_targets = size, cu_seqlens, valid_targets
        self.length: int | None = None  # T of a model input [B, T, ...]
        self.counted = False
        self.open: Counter[str] = Counter()  # by parameter, uses in forward passes whose backward has not come
        self.square_norms: Tensor | None = None  # [B] float64, of the samples' whole gradients

    @property
    def samples(self) -> int:
        assert self.size is not None  # SaliencyScorer.use has checked
        return self.size

    def inverse(self, coefficients: Tensor) -> Tensor:
        """``1 / c_b`` (0 for c_b = 0), ``[B]``."""
        if coefficients.shape != (self.samples,):
            raise ValueError(
                f"a tensor reduction must have shape ({self.samples},), one coefficient per sample; "
                f"got {tuple(coefficients.shape)}"
            )
        c = coefficients.detach()
        return torch.where(c == 0, torch.zeros_like(c), 1 / torch.where(c == 0, torch.ones_like(c), c))


@dataclass(frozen=True, slots=True)
class Layout:
    """How one use of a parameter lays its samples out.

    Args:
        batch: the samples.
        name: of the parameter, for messages.
        owner: ``[rows]`` int64, the sample of each row of a 2-D tensor; None: as the shapes say.
        dim: 1 where the samples are the second dimension (time first), as inside multi-head attention.
    """

    batch: Batch
    name: str
    owner: Tensor | None = None
    dim: int = 0

    @property
    def samples(self) -> int:
        return self.batch.samples

    def by_sample(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[B, T, F]`` (``[B, F]`` for one row a sample), or rows ``[R, F]`` with their offsets ``[B + 1]``."""
        samples, offsets = self.samples, self.batch.cu_seqlens
        if offsets is not None:
            rows = x.flatten(0, -2)
            if self.owner is not None or len(rows) != int(offsets[-1]):
                raise ValueError(
                    f"the rows of the layer of {self.name!r} must be the {int(offsets[-1])} of cu_seqlens; "
                    f"got an input of shape {tuple(x.shape)}"
                )
            return rows, offsets
        if self.owner is not None and x.ndim == 2 and len(x) == len(self.owner):
            order = self.owner.argsort(stable=True)
            return x[order], offsets_of(self.owner, samples)
        if self.dim == 1 and x.ndim == 3 and x.shape[1] == samples:
            return x.transpose(0, 1), None
        if self.dim == 1 and x.ndim == 2 and samples and len(x) % samples == 0:
            return x.unflatten(0, (-1, samples)).transpose(0, 1), None
        if not samples and x.ndim == 2 and not len(x):  # an empty batch, whatever the dimension of its samples
            return x, None
        if self.dim == 0 and self.owner is None:
            if x.ndim == 2 and len(x) == samples:
                return x, None
            if x.ndim > 2 and len(x) == samples:
                return x.flatten(1, -2), None
            if x.ndim == 2 and samples and len(x) % samples == 0:
                return x.unflatten(0, (samples, -1)), None
        raise ValueError(
            f"the leading dimension at the layer of {self.name!r} must be the {samples} samples, or a multiple of it "
            f"in a 2-D input; got shape {tuple(x.shape)}. Declare the samples by scorer.batch(size=...)"
        )

    def sums(self, x: Tensor) -> Tensor:
        """``[..., F]`` -> ``[B, F]``: every sample's rows summed."""
        rows, offsets = self.by_sample(x)
        if offsets is not None:
            offsets = offsets.to(rows.device, torch.int64)
            return torch.segment_reduce(rows.to(_accumulation(rows)), "sum", offsets=offsets, axis=0)
        return rows if rows.ndim == 2 else rows.sum(dim=1, dtype=_accumulation(rows))

    def images(self, x: Tensor) -> Tensor:
        """``[B, n, ...]``: the n >= 1 items of a first dimension of B or B n that belong to each sample."""
        if self.owner is not None or self.dim or self.batch.cu_seqlens is not None or len(x) % max(1, self.samples):
            raise ValueError(
                f"the leading dimension at the layer of {self.name!r} must be the {self.samples} samples or a multiple "
                f"of it, and not packed; got shape {tuple(x.shape)}"
            )
        return x.unflatten(0, (self.samples, len(x) // self.samples if self.samples else 1))


@dataclass(frozen=True, slots=True)
class Whole:
    """The layout of a use that is trained and not scored: everything belongs to one sample."""

    samples = 1

    def by_sample(self, x: Tensor) -> tuple[Tensor, None]:
        return x.flatten(0, -2)[None], None

    def sums(self, x: Tensor) -> Tensor:
        return x.flatten(0, -2).sum(dim=0, keepdim=True, dtype=_accumulation(x))

    def images(self, x: Tensor) -> Tensor:
        return x[None]


def offsets_of(owner: Tensor, samples: int) -> Tensor:
    """``[B + 1]``: where each sample's rows begin once they are sorted by owner."""
    lengths = owner.bincount(minlength=samples)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
