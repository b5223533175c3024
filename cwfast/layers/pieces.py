"""One use's gradient of a weight, sample by sample, in the form in which it costs least.

Here: the base of all forms, gradients that exist, and gradients that are computed a few samples at a time. Others:
sums over rows (outer.py), a convolution's windows (windows.py), several forms of one weight (places.py).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from cwfast.layers.frozen import Frozen


class Piece:
    """The base of all forms: what can add one sample's gradient to a tensor can be scored, summed and measured.

    ``samples`` B; ``add_to(out, b)`` adds sample b's gradient; ``scaled(c)`` multiplies sample b's by ``c[b]``.
    """

    samples: int

    def add_to(self, out: Tensor, sample: int) -> None:
        raise NotImplementedError

    def scaled(self, coefficients: Tensor) -> "Piece":
        raise NotImplementedError

    def narrowed(self, begin: int, end: int) -> "Piece | None":
        """The gradient of the rows ``begin`` to ``end`` of the weight; None where it cannot be had alone."""
        return None

    def total(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The gradient of all samples together."""
        out = torch.zeros(shape, dtype=dtype, device=device)
        for sample in range(self.samples):
            self.add_to(out, sample)
        return out

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        """``out += sum_b |scale factor G_b|**power``; ``grad = sum_b G_b``, whatever it holds.

        One sample at a time in one buffer.
        """
        if grad is not None:
            grad.zero_()
        buffer = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        for sample in range(self.samples):
            self.add_to(buffer.zero_(), sample)
            if grad is not None:
                grad += buffer
            if factor is not None:
                buffer *= factor
            out.add_(buffer.abs_() if power == 1 else buffer.square_(), alpha=abs(scale) ** power)

    def square_norms(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, frozen: Frozen | None = None
    ) -> Tensor:
        """``|G_b|^2`` of every sample, ``[B]``: of the entries that are not ``frozen``."""
        buffer = torch.empty(shape, dtype=dtype, device=device)
        norms = torch.zeros(self.samples, dtype=dtype, device=device)
        for sample in range(self.samples):
            self.add_to(buffer.zero_(), sample)
            norms[sample] = (buffer if frozen is None else frozen.clear_(buffer)).square().sum()
        return norms


class PerSample(Piece):
    """The samples' gradients themselves, ``[B, *shape]``: biases, norms, broadcast parameters. No larger than what the
    layer computed from them."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients, self.samples = gradients, len(gradients)

    def add_to(self, out: Tensor, sample: int) -> None:
        out += self.gradients[sample]

    def scaled(self, coefficients: Tensor) -> "PerSample":
        return PerSample(self.gradients * over(coefficients, self.gradients))

    def total(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.gradients.sum(dim=0, dtype=dtype)

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        if self.gradients.shape[1:] != out.shape:
            raise ValueError(
                f"a sample's gradient must have the shape {tuple(out.shape)} of the weight; "
                f"got {tuple(self.gradients.shape[1:])}"
            )
        g = self.gradients.to(out.dtype)
        if grad is not None:
            torch.sum(g, dim=0, out=grad)
        total = (g.abs() if power == 1 else g.square()).sum(dim=0)
        if factor is not None:
            total *= magnitude(factor, out.dtype, power)
        out.add_(total, alpha=abs(scale) ** power)

    def square_norms(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, frozen: Frozen | None = None
    ) -> Tensor:
        squares = self.gradients.to(dtype).square().reshape(self.samples, math.prod(shape))
        return (squares if frozen is None else frozen.clear_(squares)).sum(dim=1)


class Computed(Piece):
    """A gradient that is computed a few samples at a time, so that no ``[B, *shape]`` exists.

    Memory of ``accumulate_`` beside scores and gradient: one chunk as ``compute`` gives it, and what that needs to run;
    a chunk's sum; one sample's gradient in the dtype of the scores where that is another; with a factor, the sums that
    wait for it.

    Args:
        samples: B.
        compute: ``compute(begin, end) -> [end - begin, *shape]``, the gradients of these samples, a new tensor.
        together: ``() -> [*shape]``, the gradient of all samples.
        chunk: how many samples ``compute`` takes at most.
    """

    def __init__(
        self,
        samples: int,
        compute: Callable[[int, int], Tensor],
        together: Callable[[], Tensor],
        chunk: int = 1,
    ) -> None:
        self.samples, self.compute, self.together, self.chunk = samples, compute, together, chunk
        self.coefficients: Tensor | None = None

    def _chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """The first sample of each chunk, and the gradients of its samples; one sample's where they are converted.

        The caller lets go of them before it asks for more: two chunks are not to be in memory at once.
        """
        for begin in range(0, self.samples, self.chunk):
            gradients = self.compute(begin, min(begin + self.chunk, self.samples))
            step = len(gradients) if gradients.dtype == dtype else 1
            for k in range(0, len(gradients), step):
                part = gradients[k : k + step].to(dtype)
                if self.coefficients is not None:
                    part *= over(self.coefficients[begin + k : begin + k + step], part)
                yield begin + k, part
                del part
            del gradients

    def add_to(self, out: Tensor, sample: int) -> None:
        one = self.compute(sample, sample + 1)[0]
        out.add_(one, alpha=1 if self.coefficients is None else float(self.coefficients[sample]))

    def scaled(self, coefficients: Tensor) -> Self:
        piece = copy.copy(self)
        piece.coefficients = coefficients if self.coefficients is None else coefficients * self.coefficients
        return piece

    def total(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.coefficients is not None:
            return super().total(shape, dtype, device)
        return self.together().to(dtype)

    def accumulate_(
        self, out: Tensor, power: int, factor: Tensor | None, scale: float, grad: Tensor | None, backend: str
    ) -> None:
        if grad is not None:
            grad.zero_()
        total = out if factor is None else torch.zeros(out.shape, dtype=out.dtype, device=out.device)
        for _, gradients in self._chunks(out.dtype):
            if grad is not None:
                grad += _summed(gradients)
            gradients = gradients.abs_() if power == 1 else gradients.square_()
            total.add_(_summed(gradients), alpha=abs(scale) ** power)
            del gradients
        if factor is not None:
            for _ in range(power):  # in place: no magnitude of the factor in memory
                total *= factor
            out += total.abs_()

    def square_norms(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, frozen: Frozen | None = None
    ) -> Tensor:
        norms = torch.zeros(self.samples, dtype=dtype, device=device)
        for begin, gradients in self._chunks(dtype):
            squares = gradients.square_().reshape(len(gradients), -1)
            norms[begin : begin + len(gradients)] = (squares if frozen is None else frozen.clear_(squares)).sum(dim=1)
            del squares
            del gradients
        return norms


def magnitude(factor: Tensor, dtype: torch.dtype, power: int) -> Tensor:
    """``|factor|**power``."""
    factor = factor.to(dtype)
    return factor.abs() if power == 1 else factor.square()


def over(coefficients: Tensor, x: Tensor) -> Tensor:
    """The samples' coefficients, in the form that multiplies ``x [B, ...]``."""
    return coefficients.to(x).view(-1, *[1] * (x.ndim - 1))


def _summed(gradients: Tensor) -> Tensor:
    return gradients[0] if len(gradients) == 1 else gradients.sum(dim=0)
